"""Three steps over real problems with a real tokenizer and a small random Qwen2 model; needs the shared data folder."""

import shutil
from pathlib import Path

import pytest
import torch
from toy_runs import ROOT, Toy, launch, rollout_rows
from transformers import Qwen2Config, Qwen2ForCausalLM

DATA = ROOT.parent / "shared" / "data"


@pytest.mark.skipif(not DATA.exists(), reason="the shared data folder is not here")
def test_gsm8k_with_the_qwen2_tokenizer(toy: Toy, tmp_path: Path):
    model = tmp_path / "model"
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=151936,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        eos_token_id=151645,
        bos_token_id=None,
    )
    Qwen2ForCausalLM(config).save_pretrained(model)
    for path in (DATA / "tokenizer_qwen2").iterdir():
        if path.suffix == ".json":
            shutil.copyfile(path, model / path.name)
    tree = toy.tree(
        tmp_path / "run",
        model={"path": str(model)},
        data={"train": str(DATA / "train" / "gsm8k_5000.jsonl"), "max_prompt_length": 200, "instruction": "Box it."},
        rollout={"prompts_per_step": 2, "rollouts_per_prompt": 4, "max_response_length": 8},
        reward={"grader": "math_verify"},
        train={"steps": 3, "max_tokens_per_micro_batch": 1024},
    )
    rows = launch(tree, tmp_path, 2)
    assert [row["step"] for row in rows[-3:]] == [1, 2, 3]
    # A random model boxes nothing: no success, no gate, no advantage; the data and the whole path are what is tried.
    last = rollout_rows(tmp_path / "run", 3)
    assert {row["status"] for row in last} == {"unparsed"} and rows[-1]["lens/purified_rate"] == 1.0
    assert all("Box it." in row["prompt"] and row["answer"] for row in last)

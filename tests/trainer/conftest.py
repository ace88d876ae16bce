"""A small random model and its data, made once per session."""

from itertools import islice

import pytest
import torch
from toy_runs import Toy
from transformers import Qwen3Config, Qwen3ForCausalLM

from lens_megatron.demo.problems import stream, write_jsonl
from lens_megatron.demo.tokenizer import train_tokenizer


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    folder = tmp_path_factory.mktemp("toy")
    problems = list(islice(stream("train", 0, {0: 1, 1: 1}), 400))
    tokenizer = train_tokenizer(line for p in problems for line in (p.problem, p.solution))
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer) + 1,  # not divisible by two: padding under TP2
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    model = Qwen3ForCausalLM(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data *= 4  # peaked enough for rewards and ratios to move within two steps
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    write_jsonl(folder / "train.jsonl", iter(problems), 24)
    write_jsonl(folder / "eval.jsonl", stream("eval", 0, {0: 1}), 8)
    return Toy(folder / "model", folder / "train.jsonl", folder / "eval.jsonl")

"""The trainer's layers on one GPU: `pytest -m gpu tests/trainer/test_gpu.py`. Not run on one yet.

Flash attention on packed sequences, and Transformer Engine's layers where it is installed, against transformers and
against each other: log-probabilities, and the gradient norm of an update.
"""

import importlib.util
from pathlib import Path

import pytest
import torch
from chosen import objective
from records import rollout, training_rows
from test_layouts import SIZES, saved
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from lens_megatron.batch import pack
from lens_megatron.config import Config, from_tree
from lens_megatron.policy import hf_weights
from lens_megatron.policy.forward import response_log_probs
from lens_megatron.policy.model import Policy, build_policy
from lens_megatron.policy.optimizer_step import optimizer_step
from lens_megatron.types import Sample

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
PAIRS = [((5, 9, 2), (3, 7, 11, 6)), (tuple(range(40)), tuple(range(60, 100))), ((1,), (2,))]
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.1}  # nats; bfloat16 has 8 bits


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved(tmp_path_factory.mktemp("model"), lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES)))


def tree(path: str, dtype: str) -> dict:
    sections = {"run": {"directory": "unused"}, "data": {"train": "unused"}, "rollout": {"max_response_length": 256}}
    return sections | {"model": {"path": path, "dtype": dtype}}


def log_probs_by_transformers(path: str, dtype: str) -> list[torch.Tensor]:
    network = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)).cuda()
    found = []
    with torch.no_grad():
        for prompt, response in PAIRS:
            logits = network(torch.tensor([prompt + response], device="cuda")).logits[0, len(prompt) - 1 : -1]
            targets = torch.tensor(response, device="cuda")[:, None]
            found.append(logits.float().log_softmax(-1).gather(1, targets)[:, 0].cpu())
    return found


def gradient_norm(policy: Policy, config: Config) -> float:
    rows = [
        Sample(prompt, prompt, rollout(True, tokens=response), 1.0 + i, 1.0)
        for i, (prompt, response) in enumerate(PAIRS)
    ]
    batches = pack.pack(
        training_rows(rows),
        scale=pack.count(rows),
        algorithm=config.algorithm,
        max_response_length=64,
        parts=[[0, 1], [2]],
        device=policy.mesh.device,
        layout=policy.layout,
    )
    return optimizer_step(
        policy, batches, pack.count(rows), objective(config.algorithm), config.algorithm, 1.0
    ).grad_norm


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_own_layers_are_transformers(dtype: str, model: str, mesh, monkeypatch):
    monkeypatch.setattr(hf_weights, "transformer_engine_available", lambda: False)
    config = from_tree(tree(model, dtype) | {"algorithm": {"kl_coef": 0.0}, "lens": {"enabled": False}})
    found = response_log_probs(build_policy(config, mesh), PAIRS, max_tokens=1000, temperature=1.0)
    for mine, theirs in zip(found, log_probs_by_transformers(model, dtype), strict=True):
        assert (mine - theirs).abs().max() < TOLERANCE[dtype]


@pytest.mark.skipif(importlib.util.find_spec("transformer_engine") is None, reason="needs Transformer Engine")
def test_own_layers_are_transformer_engines(model: str, mesh, monkeypatch, tmp_path: Path):
    config = from_tree(tree(model, "bfloat16") | {"algorithm": {"kl_coef": 0.0}, "lens": {"enabled": False}})
    engines = build_policy(config, mesh)
    monkeypatch.setattr(hf_weights, "transformer_engine_available", lambda: False)
    own = build_policy(config, mesh)
    for mine, theirs in zip(
        *(response_log_probs(policy, PAIRS, max_tokens=1000, temperature=1.0) for policy in (own, engines)), strict=True
    ):
        assert (mine - theirs).abs().max() < TOLERANCE["bfloat16"]
    assert gradient_norm(own, config) == pytest.approx(gradient_norm(engines, config), rel=0.02)

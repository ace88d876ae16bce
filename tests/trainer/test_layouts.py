"""Scores, log-probabilities, losses, gradients and trained weights are the same under every layout.

`layout_run.py` is what every rank runs: one set of samples through two updates. Float32, relative 1e-4 of each tensor's
largest entry (measured: 5e-6). Not covered: bfloat16, Transformer Engine, GPUs.
"""

import json
import subprocess
from pathlib import Path

import pytest
import torch
from toy_runs import ROOT, environment, torchrun
from transformers import Qwen3Config, Qwen3ForCausalLM

ALONE = 10**6  # tokens: one micro-batch for all
TP, PP, CP = "tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"
VPP, SP = "virtual_pipeline_model_parallel_size", "sequence_parallel"
FULL_RECOMPUTATION = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
LAYOUTS = {
    1: {
        "alone": ("token", ALONE, {}),
        "alone, sequences": ("sequence_geometric", ALONE, {}),
        "micro-batches": ("token", 40, {}),
        "selective recomputation": ("token", 40, {"transformer": {"recompute_granularity": "selective"}}),
        "full recomputation": ("token", 40, {"transformer": FULL_RECOMPUTATION}),
    },
    2: {
        "DP2": ("token", 40, {}),
        "DP2, distributed optimizer": ("token", ALONE, {"use_distributed_optimizer": True}),
        "TP2": ("token", 40, {TP: 2}),
        "TP2, SP": ("token", ALONE, {TP: 2, SP: True}),
        "TP2, SP, full recomputation": ("token", 40, {TP: 2, SP: True, "transformer": FULL_RECOMPUTATION}),
        "PP2": ("token", 40, {PP: 2}),
        "PP2, VPP2": ("token", 40, {PP: 2, VPP: 2}),
        "CP2": ("token", 40, {CP: 2}),
        "CP2, sequences": ("sequence_geometric", 40, {CP: 2}),
    },
    4: {
        "TP2 x PP2, SP": ("token", 40, {TP: 2, SP: True, PP: 2}),
        "TP2 x CP2, SP": ("token", 40, {TP: 2, SP: True, CP: 2}),
        "CP2 x DP2": ("token", 40, {CP: 2}),
        "CP2 x PP2": ("token", 40, {CP: 2, PP: 2}),
    },
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("models")
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "head_dim": 32}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    for role in ("", "_reference"):
        torch.manual_seed(len(role))
        network = Qwen3ForCausalLM(Qwen3Config(vocab_size=131, max_position_embeddings=1024, **sizes, **heads))
        for parameter in network.parameters():
            parameter.data = torch.randn_like(parameter) * 0.15 if parameter.dim() > 1 else torch.rand_like(parameter)
        network.save_pretrained(folder / f"model{role}")
    return str(folder / "model")


@pytest.fixture(scope="module")
def found(model: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, torch.Tensor]]:
    """Results by layout. One start of the ranks for all layouts of a size: that is what takes the time."""
    folder = tmp_path_factory.mktemp("results")
    program = str(ROOT / "tests" / "trainer" / "layout_run.py")
    for ranks, layouts in LAYOUTS.items():
        command = [*torchrun(ranks), program, model, str(folder), json.dumps(layouts)]
        result = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-6000:]
    return {name: read(folder, name, ranks) for ranks, layouts in LAYOUTS.items() for name in layouts}


def read(folder: Path, name: str, ranks: int) -> dict[str, torch.Tensor]:
    merged: dict[str, torch.Tensor] = {}
    for rank in range(ranks):
        for key, value in torch.load(folder / f"{name} rank {rank}.pt").items():
            assert merged.setdefault(key, value).equal(value), f"{name}: {key} differs among ranks that share it"
    return merged


@pytest.mark.parametrize("name", [name for layouts in LAYOUTS.values() for name in layouts])
def test_same_under(name: str, found: dict[str, dict[str, torch.Tensor]]):
    expected = found["alone, sequences" if name.endswith("sequences") else "alone"]
    assert found[name].keys() == expected.keys()
    for key, value in expected.items():
        error = (found[name][key] - value).abs().max() / value.abs().max().clamp(min=1e-6) if value.numel() else 0.0
        assert error < 1e-4, f"{key} is off by {error:.1e}: {found[name][key].flatten()[:3]}, {value.flatten()[:3]}"


def test_the_comparison_sees_training(found: dict[str, dict[str, torch.Tensor]]):
    """Both updates happened and changed the weights; nothing is trivially zero; the objectives differ."""
    token, sequences = found["alone"], found["alone, sequences"]
    assert token["update0.grad_norm"] > 0.1 and token["update0.loss"] != token["update1.loss"]
    assert token["update0.kl"] > 0 and token["update1.clip_fraction"] > 0 and token["scores.2"].max() > 0.1
    assert token["update1.loss"] != sequences["update1.loss"]

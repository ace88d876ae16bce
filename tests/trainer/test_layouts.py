"""Scores, log-probabilities, losses, gradients and trained weights are the same under every layout.

`layout_run.py` is what every rank runs: one set of samples through two updates. Some have the same prompt, whose rows
are shared wherever context parallelism does not cut them, but not in the cases called alone. Float32, relative 1e-4 of
each tensor's largest entry (measured: 5e-6). Exported weights equal mbridge's bit for bit (export_check.py). Not
covered: bfloat16, Transformer Engine, GPUs.
"""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from toy_runs import ROOT, run_ranks
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

ALONE = 10**6  # tokens: one micro-batch for all
SEVERAL = 64  # tokens: three micro-batches for all, two for the fuller of two ranks
TP, PP, CP = "tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"
VPP, SP = "virtual_pipeline_model_parallel_size", "sequence_parallel"
EP, ETP = "expert_model_parallel_size", "expert_tensor_parallel_size"
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
ROUTERS_LOSS = {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0.5}
Found = dict[str, dict[str, torch.Tensor]]


CORRECTED = {"correction": "token_mask", "correction_low": 0.2, "correction_high": 5.0}


def case(
    max_tokens: int = SEVERAL,
    ratio: str = "token",
    share: str = "even",
    corrected: bool = False,
    objective: str = "clip",
    sharing: bool | None = None,
    floor: float = 0.0,
    **megatron: object,
) -> dict:
    algorithm = {"ratio": ratio, "objective": objective, "rescued_ratio_floor": floor}
    algorithm |= CORRECTED if corrected else {}
    train = {"share_prompts": sharing}
    return {"max_tokens": max_tokens, "algorithm": algorithm, "share": share, "megatron": megatron, "train": train}


DENSE = {
    1: {
        "alone": case(ALONE, sharing=False),
        "alone, sequences": case(ALONE, "sequence_geometric", sharing=False),
        "alone, corrected": case(ALONE, corrected=True),
        "sharing prompts": case(ALONE, sharing=True),
        "sharing prompts, sequences": case(ALONE, "sequence_geometric", sharing=True),
        "alone, sapo": case(ALONE, objective="sapo"),
        "alone, cispo": case(ALONE, objective="cispo"),
        "alone, floored": case(ALONE, floor=0.95),
        "micro-batches": case(),
        "selective recomputation": case(transformer={"recompute_granularity": "selective"}),
        "full recomputation": case(transformer=FULL),
    },
    2: {
        "DP2": case(),
        "DP2, a rank without samples": case(share="all on one"),
        "DP2, dealt": case(share="dealt"),
        "DP2, dealt in reverse": case(share="dealt in reverse"),
        "DP2, overlapped": case(ddp={"overlap_grad_reduce": True}),
        "DP2, distributed optimizer": case(ALONE, use_distributed_optimizer=True),
        "TP2": case(**{TP: 2}),
        "TP2, SP": case(ALONE, **{TP: 2, SP: True}),
        "TP2, SP, full recomputation": case(**{TP: 2, SP: True}, transformer=FULL),
        "PP2": case(**{PP: 2}),
        "PP2, VPP2": case(**{PP: 2, VPP: 2}),
        "CP2": case(**{CP: 2}),
        "CP2, sequences": case(ratio="sequence_geometric", **{CP: 2}),
        "CP2, corrected": case(corrected=True, **{CP: 2}),
        "CP2, sapo": case(objective="sapo", **{CP: 2}),
        "TP2, SP, cispo": case(objective="cispo", **{TP: 2, SP: True}),
        "DP2, corrected": case(corrected=True),
        "DP2, floored": case(floor=0.95),
        "CP2, floored": case(floor=0.95, **{CP: 2}),
        "PP2, corrected": case(corrected=True, **{PP: 2}),
    },
    4: {
        "TP2 x PP2, SP": case(**{TP: 2, SP: True, PP: 2}),
        "TP2 x CP2, SP": case(**{TP: 2, SP: True, CP: 2}),
        "CP2 x DP2": case(**{CP: 2}),
        "CP2 x PP2": case(**{CP: 2, PP: 2}),
    },
}
EXPERTS = {
    1: {
        "alone": case(ALONE, sharing=False),
        "micro-batches": case(),
        "alone, routers' loss": case(1, transformer=ROUTERS_LOSS),
    },
    2: {
        "EP2": case(**{EP: 2}),
        "EP2, distributed optimizer": case(**{EP: 2}, use_distributed_optimizer=True),
        "EP2, a rank without samples": case(share="all on one", **{EP: 2}),
        "EP2 in TP2, SP": case(**{EP: 2, ETP: 1, TP: 2, SP: True}),
        "EP2 in CP2": case(**{EP: 2, CP: 2}),
        "TP2, SP, experts whole": case(**{TP: 2, SP: True}),
        "EP2, routers' loss": case(1, **{EP: 2}, transformer=ROUTERS_LOSS),
    },
    4: {
        "EP2 x TP2, SP": case(**{EP: 2, TP: 2, SP: True}),
        "EP2 x PP2": case(**{EP: 2, PP: 2}),
        "EP2 x PP2, VPP2": case(**{EP: 2, PP: 2, VPP: 2}),
        "EP2 x DP2": case(**{EP: 2}),
    },
}
EXPORTED = {
    2: {"TP2": {TP: 2}, "PP2, VPP2": {PP: 2, VPP: 2}, "DP2": {"use_distributed_optimizer": True}},
    4: {"TP2 x PP2": {TP: 2, PP: 2}, "PP4": {PP: 4}},
}
EXPERTS_EXPORTED = {
    2: {"EP2 in TP2": {EP: 2, ETP: 1, TP: 2, SP: True}},
    4: {"EP2 x TP2": {EP: 2, TP: 2, SP: True}, "EP2 x PP2, VPP2": {EP: 2, PP: 2, VPP: 2}},
}
SIZES = {
    "vocab_size": 131,
    "max_position_embeddings": 1024,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "head_dim": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "norm_topk_prob": True}


def saved(folder: Path, build: Callable[[], torch.nn.Module]) -> str:
    """Path of a policy, beside which is its reference, with other weights."""
    for role in ("", "_reference"):
        torch.manual_seed(len(role))
        network = build()
        for parameter in network.parameters():
            parameter.data = torch.randn_like(parameter) * 0.15 if parameter.dim() > 1 else torch.rand_like(parameter)
        network.save_pretrained(folder / f"model{role}")
    return str(folder / "model")


def with_exports(layouts: dict[int, dict], exported: dict[int, dict], models: dict[str, str]) -> dict[int, dict]:
    """The layouts, and the export alone of other models."""
    more = {
        ranks: {
            f"export of {name}, {layout}": {"model": model, "megatron": options}
            for layout, options in cases.items()
            for name, model in models.items()
        }
        for ranks, cases in exported.items()
    }
    return {ranks: cases | more.get(ranks, {}) for ranks, cases in layouts.items()}


def results(model: str, folder: Path, layouts: dict[int, dict[str, dict]]) -> Found:
    """What every layout computes. The ranks are started once for all layouts of a size."""
    program = ROOT / "tests" / "trainer" / "layout_run.py"
    for ranks, cases in layouts.items():
        run_ranks(ranks, program, model, folder, json.dumps(cases), timeout_s=600)
    named = ((ranks, name) for ranks, cases in layouts.items() for name in cases if not name.startswith("export of"))
    return {name: read(folder, name, ranks) for ranks, name in named}


def read(folder: Path, name: str, ranks: int) -> dict[str, torch.Tensor]:
    merged: dict[str, torch.Tensor] = {}
    for rank in range(ranks):
        for key, value in torch.load(folder / f"{name} rank {rank}.pt").items():
            assert merged.setdefault(key, value).equal(value), f"{name}: {key} differs among ranks that share it"
    return merged


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Found:
    folder = tmp_path_factory.mktemp("dense")
    untied = SIZES | {"tie_word_embeddings": False}
    others = {
        "untied Qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**untied)),
        "Qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**untied)),
        "Llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    }
    paths = {name: saved(folder / name, build) for name, build in others.items()}
    model = saved(folder, lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES)))
    return results(model, folder, with_exports(DENSE, EXPORTED, paths))


@pytest.fixture(scope="module")
def expert_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("expert_model")
    return saved(folder, lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, **MOE)))


@pytest.fixture(scope="module")
def experts(expert_model: str, tmp_path_factory: pytest.TempPathFactory) -> Found:
    folder, sizes = tmp_path_factory.mktemp("experts"), SIZES | MOE | {"tie_word_embeddings": False}
    untied = saved(folder / "untied", lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, mlp_only_layers=[1])))
    return results(expert_model, folder, with_exports(EXPERTS, EXPERTS_EXPORTED, {"untied experts": untied}))


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        error = (found[name] - value).abs().max() / value.abs().max().clamp(min=1e-6) if value.numel() else 0.0
        assert error < 1e-4, f"{name} is off by {error:.1e}: {found[name].flatten()[:3]} for {value.flatten()[:3]}"


@pytest.mark.parametrize("name", [name for cases in DENSE.values() for name in cases])
def test_same_under(name: str, dense: Found):
    kinds = (", sequences", ", corrected", ", sapo", ", cispo", ", floored")
    kind = next((kind for kind in kinds if name.endswith(kind)), "")
    assert_same(dense[name], dense[f"alone{kind}"])


@pytest.mark.parametrize("name", [name for cases in EXPERTS.values() for name in cases])
def test_experts_same_under(name: str, experts: Found):
    assert_same(experts[name], experts["alone, routers' loss" if name.endswith("routers' loss") else "alone"])


def test_the_comparison_sees_training(dense: Found, experts: Found):
    """Both updates happened and changed the weights; nothing is trivially zero; objectives and losses differ."""
    for found in (dense["alone"], experts["alone"]):
        assert found["update0.grad_norm"] > 0.1 and found["update0.loss"] != found["update1.loss"]
        assert found["update0.kl"] > 0 and found["update1.clip_fraction"] > 0 and found["scores.2"].max() > 0.1
    losses = {float(dense[f"alone{kind}"]["update1.loss"]) for kind in ("", ", sequences", ", sapo", ", cispo")}
    assert len(losses) == 4
    for update in ("update0", "update1"):  # three rescued responses, of 9, 7 and 12 tokens
        least, products = (
            [float(dense["alone"][f"{update}.rescued.{name}.{i}"]) for i in range(3)] for name in ("least", "products")
        )
        assert least == sorted(least) and products == sorted(products) and products[0] < least[0] < 0.95
    literal, floored = (dense[name]["update0.rescued.gradient"] for name in ("alone", "alone, floored"))
    assert 0.5 < literal / floored < 0.97 and floored <= dense["alone"]["update0.rescued.on_policy_gradient"]
    corrected = dense["alone, corrected"]
    assert dense["alone"]["update0.loss"] != corrected["update0.loss"]
    for origin in ("native", "rescued"):
        tokens, limited = (corrected[f"update0.mismatch_{origin}.{name}"] for name in ("tokens", "limited"))
        assert 0 < limited < tokens and corrected[f"update0.mismatch_{origin}.largest"] > 0.01
    with_router = experts["alone, routers' loss"]["update0.grad_norm"]
    assert abs(with_router / experts["alone"]["update0.grad_norm"] - 1) > 1e-3


def test_the_comparison_sees_every_expert_and_router_train(expert_model: str, experts: Found):
    before = load_file(Path(expert_model) / "model.safetensors")
    names = [name for name in before if ".mlp.experts." in name or ".mlp.gate." in name]
    assert len(names) == 4 * (3 * 4 + 1)
    assert all((experts["alone"][f"weight.{name}"] - before[name]).abs().max() > 1e-5 for name in names)

"""Qwen3-MoE's refusals before start, and the routers' own loss. That experts compute, load, export and train as they
should under every layout is in test_policy.py and test_layouts.py."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from chosen import objective
from records import rollout, training_rows
from torch import Tensor
from toy_runs import Toy, launch
from transformers import AutoTokenizer, Qwen3Config, Qwen3MoeConfig, Qwen3MoeForCausalLM

from lens_megatron.batch import pack
from lens_megatron.config import Config, ConfigError, check_world, from_tree
from lens_megatron.policy import platform
from lens_megatron.policy.model import build_policy, check_layout
from lens_megatron.policy.optimizer_step import optimizer_step
from lens_megatron.policy.parallel import build_mesh, shut_down
from lens_megatron.types import Sample

EXPERTS, CHOSEN = 6, 2
PAIRS = [((1, 5, 9), (3, 7)), ((2, 8, 100), (4, 5, 6, 7, 9, 11)), ((2, 8, 100, 17, 8), (129,))]
PARTS = [[0, 1], [2]]


def hf_config(**options) -> Qwen3MoeConfig:
    return Qwen3MoeConfig(
        **{
            "vocab_size": 131,
            "hidden_size": 64,
            "intermediate_size": 96,
            "moe_intermediate_size": 44,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "head_dim": 32,
            "max_position_embeddings": 4096,
            "num_experts": EXPERTS,
            "num_experts_per_tok": CHOSEN,
            "norm_topk_prob": True,
            "tie_word_embeddings": True,
            **options,
        }
    )


def config(path: str = "unused", **megatron) -> Config:
    return from_tree(
        {
            "run": {"directory": "unused"},
            "model": {"path": path},
            "data": {"train": "unused"},
            "rollout": {"max_response_length": 8},
            "algorithm": {"kl_coef": 0.0},
            "megatron": {f"{k}_model_parallel_size" if len(k) == 2 else k: v for k, v in megatron.items()},
        }
    )


def layout(tp: int = 1, ep: int = 1, **options) -> Config:
    sizes = {"tensor_model_parallel_size": tp, "expert_model_parallel_size": ep, "sequence_parallel": tp > 1}
    return config(**sizes | options)


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        (layout(ep=4), r"expert_model_parallel_size \(4\) does not divide .* num_experts \(6\); choose a divisor of 6"),
        (layout(tp=2, sequence_parallel=False), "send to the experts, .* set megatron.sequence_parallel to true"),
        (layout(ep=2, expert_tensor_parallel_size=2), r"\(2\) may be at most tensor_model_parallel_size \(1\)"),
        (layout(tp=2, expert_tensor_parallel_size=1), r"set it to 2, or raise expert_model_parallel_size \(1\)"),
    ],
)
def test_layouts_of_experts_that_cannot_be_are_refused_with_reason_and_remedy(chosen: Config, message: str):
    with pytest.raises(ConfigError, match=message):
        check_layout(chosen, hf_config())


def test_layouts_of_experts_that_can_be():
    check_layout(layout(ep=3), hf_config())
    check_layout(layout(tp=4, ep=2), hf_config())
    check_layout(layout(tp=4, ep=2, expert_tensor_parallel_size=1), hf_config(moe_intermediate_size=45))
    with pytest.raises(ConfigError, match=r"\(4\) does not divide the model's moe_intermediate_size \(45\)"):
        check_layout(layout(tp=4, ep=2), hf_config(moe_intermediate_size=45))


def test_a_model_without_experts_cannot_divide_them():
    with pytest.raises(ConfigError, match="divide experts, but a qwen3 model has none; leave both at their defaults"):
        check_layout(layout(ep=2), Qwen3Config(**hf_config().to_dict() | {"model_type": "qwen3"}))


def test_the_world_holds_whole_groups_of_experts():
    check_world(layout(ep=4), 8)
    check_world(layout(tp=2, ep=2, expert_tensor_parallel_size=1), 2)  # experts over the tensor-parallel ranks
    with pytest.raises(
        ConfigError, match=r"world size 6 is not .* \(4\) x .* = 4; start torchrun with a multiple of 4"
    ):
        check_world(layout(ep=4), 6)
    with pytest.raises(ConfigError, match=r"expert_tensor_parallel_size \(2; by default .* = 4; .* a multiple of 4 "):
        check_world(layout(tp=2, ep=2), 2)


def test_gradient_of_the_routers_own_loss_is_its_mean_over_rows(tmp_path: Path):
    # No advantages: nothing else has a gradient. Two micro-batches, of 14 and of 6 rows.
    coefficient = 0.25
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(hf_config(output_router_logits=True, router_aux_loss_coef=coefficient)).eval()
    model.save_pretrained(tmp_path)
    device = platform.install()
    platform.init_process_group(device)
    policy = build_policy(config(str(tmp_path)), build_mesh(config().megatron, 0, device))
    try:
        samples = [Sample(p, p, rollout(True, tokens=r), 0.0, 1.0) for p, r in PAIRS]
        scale, algorithm = pack.count(samples), config().algorithm
        batches = pack.pack(
            training_rows(samples),
            scale=scale,
            algorithm=algorithm,
            max_response_length=8,
            parts=PARTS,
            device=device,
        )
        stats = optimizer_step(policy, batches, scale, objective(algorithm), algorithm, temperature=1.0)
        assert policy.bridge.config.moe_aux_loss_coeff == coefficient
    finally:
        shut_down()
    rows = [sum(len(PAIRS[i][0] + PAIRS[i][1]) for i in part) for part in PARTS]
    loss = sum(n / sum(rows) * balance(model, part) for n, part in zip(rows, PARTS, strict=True))
    (coefficient * loss).backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    assert rows == [14, 6] and norm > 0
    assert stats.grad_norm == pytest.approx(float(norm), rel=1e-4)


@pytest.mark.slow
def test_the_program_trains_and_saves_a_model_with_divided_experts(toy: Toy, tmp_path: Path):
    tokenizer = AutoTokenizer.from_pretrained(toy.model)
    tokenizer.save_pretrained(tmp_path / "model")
    sizes = {"vocab_size": len(tokenizer) + 1, "eos_token_id": tokenizer.eos_token_id}
    model = Qwen3MoeForCausalLM(hf_config(**sizes))
    model.save_pretrained(tmp_path / "model")
    tree = replace(toy, model=tmp_path / "model").tree(
        tmp_path / "run", megatron={"expert_model_parallel_size": 2}, train={"steps": 2}
    )
    rows = launch(tree, tmp_path, 2)
    assert [row["actor/ratio_min"] for row in rows[1:]] == [1.0, 1.0]
    trained = Qwen3MoeForCausalLM.from_pretrained(tmp_path / "run" / "checkpoints" / "iter_0000002" / "hf")
    for (name, now), before in zip(trained.named_parameters(), model.parameters(), strict=True):
        assert now.shape == before.shape and not now.equal(before), name


def balance(model: torch.nn.Module, part: list[int]) -> Tensor:
    """Switch Transformer's loss, summed over layers: experts x sum of (share of choices x mean probability)."""
    found = [model(torch.tensor([PAIRS[i][0] + PAIRS[i][1]]), output_router_logits=True).router_logits for i in part]
    loss = torch.zeros(())
    for layer in zip(*found, strict=True):
        probabilities = torch.cat(layer).softmax(-1)
        choices = torch.nn.functional.one_hot(probabilities.topk(CHOSEN).indices, EXPERTS).float().sum(1).mean(0)
        loss = loss + EXPERTS * (choices / CHOSEN * probabilities.mean(0)).sum()
    return loss


@pytest.mark.parametrize("kind", ["global_aux_loss", ["aux_loss"]])
def test_other_losses_of_routers_are_refused(kind: object, tmp_path: Path):
    Qwen3MoeForCausalLM(hf_config()).save_pretrained(tmp_path)
    device = platform.install()
    platform.init_process_group(device)
    mesh = build_mesh(config().megatron, 0, device)
    try:
        with pytest.raises(ConfigError, match="give none, or aux_loss"):
            build_policy(config(str(tmp_path), transformer={"moe_router_load_balancing_type": kind}), mesh)
    finally:
        shut_down()

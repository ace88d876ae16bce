"""Gradients on one batch: what is read is what a step takes, and what is reported of it is worked by hand."""

from pathlib import Path

import pytest
import torch
from chosen import objective
from records import rollout, sample, training_rows
from transformers import Qwen3Config, Qwen3ForCausalLM

from lens_megatron.batch import pack
from lens_megatron.config import from_tree
from lens_megatron.policy.model import build_policy, named_parameters
from lens_megatron.policy.optimizer_step import compute_gradients, optimizer_step
from lens_megatron.policy.parallel import Mesh
from lens_megatron.tools.compare import gradient_report, gradient_table
from lens_megatron.tools.compare.gradient_report import GradientReport, MethodGradient, TokenClass
from lens_megatron.tools.compare.gradients import read_gradients
from lens_megatron.types import Origin

SIZES = {
    **{"vocab_size": 131, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
    **{"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 1024},
    **{"eos_token_id": 0, "bos_token_id": None, "tie_word_embeddings": True},
}


def test_the_gradient_is_what_a_step_of_plain_sgd_takes_from_the_weights(mesh: Mesh, tmp_path: Path):
    torch.manual_seed(0)
    Qwen3ForCausalLM(Qwen3Config(**SIZES)).save_pretrained(tmp_path)
    plain = {"lr": 1.0, "weight_decay": 0.0, "clip_grad": 0.0}
    config = from_tree(
        {
            **{"run": {"directory": "unused"}, "model": {"path": str(tmp_path)}, "data": {"train": "unused"}},
            **{"algorithm": {"kl_coef": 0.0}, "rollout": {"max_response_length": 8}, "optimizer": plain},
            "megatron": {"optimizer": {"optimizer": "sgd", "sgd_momentum": 0.0}},
        }
    )
    policy = build_policy(config, mesh)
    samples = [sample(rollout(True), 1.5, 0.5), sample(rollout(False, tokens=(7, 8, 9)), -0.5)]
    scale, loss = pack.count(samples), objective(config.algorithm)
    batches = pack.pack(
        training_rows(samples),
        scale=scale,
        algorithm=config.algorithm,
        max_response_length=8,
        parts=[[0], [1]],
        device=mesh.device,
    )
    before = {name: p.detach().clone() for name, p in named_parameters(policy.models())}
    compute_gradients(policy, batches, loss, config.algorithm, 1.0)
    found = read_gradients(policy)
    assert all(torch.equal(before[name], p) for name, p in named_parameters(policy.models()))  # nothing has moved
    stats = optimizer_step(policy, batches, scale, loss, config.algorithm, 1.0)
    assert found.keys() == before.keys() and not stats.skipped
    for name, parameter in named_parameters(policy.models()):
        assert torch.allclose(before[name] - parameter, found[name], atol=3e-7), name  # weights are near 1
    products = gradient_report.products([found, {name: -2 * tensor for name, tensor in found.items()}])
    assert products.norm(0) == pytest.approx(stats.grad_norm, rel=1e-5) and products.norm(0) > 0
    assert products.whole().cosines[0] == pytest.approx((1.0, -1.0))
    assert products.names == ("embedding", "layer 0", "layer 1", "final norm")


def test_products_by_hand():
    first = {"embedding.weight": torch.tensor([3.0, 4.0]), "decoder.layers.0.w": torch.tensor([[2.0]])}
    second = {"embedding.weight": torch.tensor([4.0, 3.0]), "decoder.layers.0.w": torch.tensor([[0.0]])}
    products = gradient_report.products([first, second])
    assert products.norms(0) == (5.0, 2.0) and products.norms(1) == (5.0, 0.0)
    assert products.norm(0) == pytest.approx(29**0.5)
    embedding, layer = products.cosines()
    assert (embedding.name, layer.name) == ("embedding", "layer 0")
    assert embedding.cosines[0] == pytest.approx((1.0, 24 / 25))
    assert layer.cosines[0] == (1.0, None)  # the second has no gradient there
    assert products.whole().cosines[0][1] == pytest.approx(24 / (29**0.5 * 5))


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("decoder.layers.0.mlp.linear_fc1.weight", "layers 0-7"),
        ("decoder.layers.15.self_attention.linear_qkv.weight", "layers 8-15"),
        ("decoder.layers.29.mlp.linear_fc2.weight", "layers 24-29"),
        ("decoder.final_layernorm.weight", "final norm"),
        ("embedding.word_embeddings.weight", "embedding"),
        ("output_layer.weight", "head"),
    ],
)
def test_layers_are_put_together(name: str, group: str):
    assert gradient_report.layer_group(name, 30) == group


def test_classes_of_tokens_by_hand():
    success, failure = rollout(True, tokens=(5, 6)), rollout(False, tokens=(5, 6, 7, 8))
    rescued = rollout(True, Origin.PURIFIED, tokens=(9, 9))
    found = gradient_report.class_numbers(
        [sample(success, 1.0, 0.5), sample(success, 3.0, 1.0), sample(failure, -0.5), sample(rescued, 2.0, 0.25)]
    )
    # |w A| times tokens: .5 2 + 3 2 = 7, .5 4 = 2, .5 2 = 1.
    assert [(n.name, n.rollouts, n.tokens) for n in found] == [
        (TokenClass.NATIVE_SUCCESS, 2, 4),
        (TokenClass.NATIVE_FAILURE, 1, 4),
        (TokenClass.RESCUED, 1, 2),
    ]
    assert [(n.weight, n.advantage) for n in found] == [(0.75, 2.0), (1.0, -0.5), (0.25, 2.0)]
    assert [n.share for n in found] == pytest.approx([0.7, 0.2, 0.1])
    products = gradient_report.products([{"embedding.weight": torch.ones(4)}] * 2)
    methods = tuple(MethodGradient(name, 4, 2.0, (2.0,), found) for name in ("lens", "grpo"))
    report = GradientReport("run@2", 4, 3, products.names, methods, products.whole(), products.cosines())
    text = gradient_table.render(report)
    assert "| lens | rescued | 1 | 2 | 0.250 | +2.000 | 10 % |" in text and "| lens, grpo | +1.000 |" in text

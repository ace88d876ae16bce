"""Run by test_gradients.py on every rank: scores, log-probabilities and gradients beside autograd on full logits.

Usage: head_gradients.py TP PP MODEL_DIR... Prints one line per model and case; fails at the first difference. Beside
every MODEL_DIR stands MODEL_DIR_reference. The body of the model beside which we stand computes in float32, as
transformers does it; its head, softmax and loss in float64.
"""

import sys
from collections.abc import Sequence
from itertools import pairwise, product

import torch
from chosen import objective
from records import rollout, training_rows
from transformers import AutoModelForCausalLM

from lens_megatron.batch import pack
from lens_megatron.batch.pack import Pair
from lens_megatron.config import Config, from_tree
from lens_megatron.policy import platform
from lens_megatron.policy.export import export_weights
from lens_megatron.policy.forward import prompt_scores, response_log_probs
from lens_megatron.policy.head import gradient_buffer
from lens_megatron.policy.model import Policy, build_policy
from lens_megatron.policy.optimizer_step import _forward_backward
from lens_megatron.policy.parallel import build_mesh, shut_down
from lens_megatron.types import MicroBatch, Origin, Sample

TEMPERATURE = 0.7
LONG = tuple(7 * i % 131 for i in range(300))
"""More tokens than the head takes in one chunk."""
RESPONSES = [((1, 5, 9), (3, 7)), ((2, 8, 100), (4, 5, 6, 7, 9, 130)), ((2, 8, 100, 17, 8), LONG)]
CASES = {
    "fused": {},
    "overlapped": {"megatron": {"ddp": {"overlap_grad_reduce": True}}},
    "objective": {"algorithm": {"imitation_coef": 0.3}},
    "sapo": {"algorithm": {"objective": "sapo"}},
    "cispo": {"algorithm": {"objective": "cispo"}},
    "sequences": {"algorithm": {"ratio": "sequence_geometric"}},
    "distributed optimizer": {"megatron": {"use_distributed_optimizer": True}},
    "bfloat16": {"model": {"dtype": "bfloat16"}},
    "ordinary gradient": {"model": {"dtype": "bfloat16"}, "megatron": {"ddp": {"grad_reduce_in_fp32": False}}},
}
"""Every route from hidden states to a gradient, by the options that choose it."""


def main(tp: int, pp: int, paths: list[str]) -> None:
    device = platform.install()
    platform.init_process_group(device)
    layout = {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp}
    mesh = build_mesh(configuration(paths[0], layout, {}).megatron, 0, device)
    for path, case in product(paths, CASES):
        config = configuration(path, layout, CASES[case])
        policy = build_policy(config, mesh)
        if mesh.is_last_stage:
            assert (gradient_buffer(policy) is None) == (case == "ordinary gradient")
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        if case == "fused":
            check_forward(policy, model, AutoModelForCausalLM.from_pretrained(f"{path}_reference"))
        batches = micro_batches(config, device)
        found = megatron_gradients(policy, batches, config)
        sum(plain_loss(model, batch, config) for batch in batches).backward()
        expected = {name: parameter.grad for name, parameter in model.named_parameters()}
        assert found.keys() == expected.keys()
        errors = {name: float((found[name].float() - g).norm() / g.norm()) for name, g in expected.items()}
        worst = max(errors, key=errors.get)
        bound = 5e-2 if config.model.dtype == "bfloat16" else 1e-5
        assert errors[worst] < bound, f"{path}, {case}: {worst} is off by {errors[worst]:.1e}"
        if mesh.rank == 0:
            print(f"{path}, {case}: {len(errors)} tensors, worst {errors[worst]:.1e} ({worst})", flush=True)
    shut_down()


def configuration(path: str, layout: dict, options: dict) -> Config:
    tree = {
        "run": {"directory": "unused"},
        "model": {"path": path, "reference_path": f"{path}_reference", **options.get("model", {})},
        "data": {"train": "unused"},
        "rollout": {"max_response_length": 300},
        "algorithm": {"kl_coef": 0.2, "entropy_coef": 0.1, **options.get("algorithm", {})},
        "megatron": {**layout, **options.get("megatron", {})},
    }
    return from_tree(tree)


def check_forward(policy: Policy, model: torch.nn.Module, reference: torch.nn.Module) -> None:
    found = response_log_probs(policy, RESPONSES, max_tokens=64, temperature=TEMPERATURE)
    for values, pair in zip(found, RESPONSES, strict=True):
        assert (values - plain_log_probs(model, pair, TEMPERATURE)).abs().max() < 1e-5
    prompts = [prompt + response for prompt, response in RESPONSES]
    for scores, prompt in zip(prompt_scores(policy, prompts, max_tokens=64), prompts, strict=True):
        pair = prompt[:1], prompt[1:]
        expected = (plain_log_probs(model, pair) - plain_log_probs(reference, pair)).abs()
        assert scores[0] == 0 and (scores[1:] - expected).abs().max() < 1e-5
    kept, policy.reference = policy.reference, {n: p.data for n, p in policy.models()[0].named_parameters()}
    assert all(not scores.any() for scores in prompt_scores(policy, prompts, max_tokens=64))
    policy.reference = kept


def micro_batches(config: Config, device: torch.device) -> list[MicroBatch]:
    """Three responses of different lengths, two and one: on-policy, rescued, off-policy with a negative advantage."""
    rows = [
        Sample(prompt, prompt, rollout(True, origin, tokens), advantage, weight)
        for (prompt, tokens), origin, advantage, weight in zip(
            RESPONSES, (Origin.NATIVE, Origin.PURIFIED, Origin.NATIVE), (1.5, 0.8, -0.5), (0.25, 1.0, 0.75), strict=True
        )
    ]
    return pack.pack(
        training_rows(
            rows,
            [None, torch.linspace(-6.0, -4.0, 6), torch.linspace(-9.0, -2.0, 300)],
            [torch.linspace(-4.0, -8.0, len(tokens)) for _, tokens in RESPONSES],
        ),
        scale=pack.count(rows),
        algorithm=config.algorithm,
        max_response_length=300,
        parts=[[0, 1], [2]],
        device=device,
    )


def megatron_gradients(policy: Policy, batches: Sequence[MicroBatch], config: Config) -> dict[str, torch.Tensor]:
    """After the reductions over the ranks, whole and under Hugging Face names: exported in the weights' place."""
    for chunk in policy.chunks:
        chunk.train()
        chunk.zero_grad_buffer()
    _forward_backward(policy, batches, objective(config.algorithm), config.algorithm, TEMPERATURE)
    for model in policy.models():
        for parameter in model.parameters():
            parameter.data = parameter.main_grad.clone()
    return dict(export_weights(policy))


def plain_loss(model: torch.nn.Module, batch: MicroBatch, config: Config) -> torch.Tensor:
    """The objective on a full log-softmax of full logits."""
    sequences = batch.sequences
    lengths = [stop - start for start, stop in pairwise(sequences.bounds)]
    logits = torch.cat([plain_logits(model, ids)[0] for ids in sequences.input_ids.split(lengths, dim=1)])
    logits = logits[sequences.positions]
    all_log_probs = (logits / TEMPERATURE).log_softmax(-1)
    log_probs = all_log_probs.gather(1, batch.sequences.target_ids[:, None])[:, 0]
    entropy = -(all_log_probs.exp() * all_log_probs).sum(-1)
    loss = objective(config.algorithm)
    return loss.losses(log_probs, entropy, batch.terms, config.algorithm).losses.sum()


@torch.no_grad()
def plain_log_probs(model: torch.nn.Module, pair: Pair, temperature: float = 1.0) -> torch.Tensor:
    prompt, response = pair
    logits = plain_logits(model, torch.tensor([prompt + response]))[0, len(prompt) - 1 : -1]
    return (logits / temperature).log_softmax(-1).gather(1, torch.tensor(response)[:, None])[:, 0]


def plain_logits(model: torch.nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
    """[B, S, V] float64."""
    return model.model(input_ids).last_hidden_state.double() @ model.lm_head.weight.double().T


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])

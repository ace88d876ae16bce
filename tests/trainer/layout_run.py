"""One batch of samples through the trainer under several layouts: `layout_run.py MODEL OUT JSON` on every rank.

JSON maps a name to options of `megatron:`, `max_tokens` per micro-batch, options of `algorithm:`, and the `share` of
samples that each data-parallel rank has. Every rank saves what must not depend on them: scores, log-probabilities,
gradients at prompts, statistics of two updates, and the weights after them. Every case ends with the export beside
mbridge's; one that names a `model` of its own is nothing else.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import torch
from chosen import objective
from export_check import check_export
from megatron.core import parallel_state
from records import rollout, training_rows

from lens_megatron.batch import pack, redistribute
from lens_megatron.config import Config, from_tree
from lens_megatron.policy import platform
from lens_megatron.policy.export import export_weights
from lens_megatron.policy.forward import micro_batches, prompt_scores, response_log_probs
from lens_megatron.policy.model import Policy, build_policy, reference_weights
from lens_megatron.policy.optimizer_step import optimizer_step
from lens_megatron.policy.parallel import build_mesh, shut_down
from lens_megatron.policy.prompt_gradients import prompt_gradients
from lens_megatron.results import UpdateStats
from lens_megatron.types import Origin, Sample

TEMPERATURE = 0.9
LENGTHS = [(5, 9), (3, 30), (12, 4), (7, 7), (2, 1), (20, 17), (6, 12), (9, 25)]
"""(prompt, response) tokens of 8 samples, which 1 or 2 data-parallel ranks share."""
SAME_PROMPT = {4: 2, 6: 5, 7: 5}
"""Samples that have the prompt of another one."""


def samples() -> list[Sample]:
    generator = torch.Generator().manual_seed(1)
    made = []
    for i, (prompt, response) in enumerate(LENGTHS):
        tokens = tuple(torch.randint(0, 120, (prompt + response,), generator=generator).tolist())
        own, response_ids = tokens[:prompt], tokens[prompt:]
        own = made[SAME_PROMPT[i]].prompt if i in SAME_PROMPT else own
        origin = Origin.PURIFIED if i % 3 == 0 else Origin.NATIVE
        made.append(
            Sample(
                prompt=own,
                generation_prompt=own,
                rollout=replace(
                    rollout(True, origin),
                    token_ids=response_ids,
                    log_probs=tuple(-0.9 * (t % 7 + 1) for t in range(response)),
                ),
                advantage=(-1.0) ** i * (1 + i / 4),
                weight=1 - i / 16,
            )
        )
    return made


def share_of(policy: Policy, kind: str) -> list[int]:
    """Numbers of the samples that this data-parallel rank trains on."""
    mesh, everything = policy.mesh, samples()
    if kind == "even":
        return list(range(len(everything)))[mesh.dp_rank :: mesh.dp_size]
    if kind == "all on one":
        return [] if mesh.dp_rank else list(range(len(everything)))
    ordered = everything[::-1] if kind == "dealt in reverse" else everything
    sampled = ordered if mesh.dp_size == 1 else ordered[:1] if mesh.dp_rank == 0 else ordered[1:]
    mine = redistribute.redistribute(
        sampled, mesh.dp_group, policy.bridge.config.hidden_size, by_prompt=policy.shares_prompts
    ).samples
    assert len(mine) > 1  # the rank that sampled one trains on more
    return [everything.index(sample) for sample in mine]  # ValueError if a bit of one was lost on the way


def run(policy: Policy, config: Config, max_tokens: int, kind: str) -> dict[str, torch.Tensor]:
    """Scores, log-probabilities and gradients at prompts, then two updates on all samples, of which every data-parallel
    rank has a share."""
    everything = samples()
    share = share_of(policy, kind)
    mine = [everything[i] for i in share]
    pairs = [(s.prompt, s.rollout.token_ids) for s in mine]
    scores = prompt_scores(policy, [s.prompt for s in mine], max_tokens=max_tokens)
    old = response_log_probs(policy, pairs, max_tokens=max_tokens, temperature=TEMPERATURE)
    with reference_weights(policy):
        reference = response_log_probs(policy, pairs, max_tokens=max_tokens, temperature=TEMPERATURE)
    gradients = prompt_gradients(policy, pairs, max_tokens=max_tokens)
    found = {}
    values_of = {"scores": scores, "old": old, "reference": reference, "gradients": gradients}
    for name, values in values_of.items():
        found |= {f"{name}.{i}": value for i, value in zip(share, values, strict=True)}
    for number in range(2):
        stats = train(policy, config, share, old, reference, max_tokens)
        found |= {f"update{number}.{name}": torch.tensor(value) for name, value in numbers(stats)}
    return found | {f"weight.{name}": value.clone() for name, value in export_weights(policy)}


def numbers(stats: UpdateStats) -> Iterator[tuple[str, float]]:
    for name, value in asdict(stats).items():
        inner = value if isinstance(value, dict) else {"": value}
        for part, number in inner.items():
            numbered = {f".{i}": x for i, x in enumerate(number)} if isinstance(number, tuple) else {"": number}
            yield from ((f"{name}{part and '.'}{part}{place}", float(x)) for place, x in numbered.items())


def train(
    policy: Policy,
    config: Config,
    share: list[int],
    old: list[torch.Tensor],
    reference: list[torch.Tensor],
    max_tokens: int,
) -> UpdateStats:
    everything = samples()
    mine, scale = [everything[i] for i in share], pack.count(everything)
    corrected = config.algorithm.correction != "none"
    shifted = [None if i % 3 == 1 else x + 0.1 for i, x in zip(share, old, strict=True)]
    batches = pack.pack(
        training_rows(mine, shifted, reference, old if corrected else None),
        scale=scale,
        algorithm=config.algorithm,
        max_response_length=64,
        parts=micro_batches(policy, [(s.prompt, s.rollout.token_ids) for s in mine], max_tokens),
        device=policy.mesh.device,
        layout=policy.layout,
    )
    loss = objective(config.algorithm)
    return optimizer_step(policy, batches, scale, loss, config.algorithm, TEMPERATURE)


def main(model: str, out: Path, cases: dict) -> None:
    device, exported = platform.install(), set()
    for name, case in cases.items():
        platform.init_process_group(device)
        sections = (case.get("algorithm", {}), case["megatron"], case.get("train", {}))
        config = configuration(case.get("model", model), *sections)
        mesh = build_mesh(config.megatron, config.run.seed, device)
        policy = build_policy(config, mesh)
        if "model" not in case:
            found = run(policy, config, case["max_tokens"], case["share"])
            torch.save(found, out / f"{name} rank {mesh.rank}.pt")
        # Once per way of cutting the model: the rest of a layout does not change what is exported.
        cut = (case.get("model"), mesh.tp_size, mesh.pp_size, mesh.vp_size, *_expert_sizes(config))
        if cut not in exported:
            check_export(policy)
            exported.add(cut)
        parallel_state.destroy_model_parallel()
    shut_down()


def _expert_sizes(config: Config) -> tuple[int, int | None]:
    return config.megatron.expert_model_parallel_size, config.megatron.expert_tensor_parallel_size


def configuration(model: str, algorithm: dict, options: dict, train: dict) -> Config:
    return from_tree(
        {
            "run": {"directory": "unused"},
            "model": {"path": model, "reference_path": f"{model}_reference"},
            "data": {"train": "unused"},
            "rollout": {"max_response_length": 64},
            "algorithm": {"kl_coef": 0.1, "entropy_coef": 0.01, **algorithm},
            "optimizer": {"lr": 1e-3, "adam_eps": 1e-3},  # an epsilon at which Adam does not amplify rounding
            "megatron": options,
            "train": train,
        }
    )


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3]))

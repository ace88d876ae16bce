"""Samples of a step -> balanced shares -> reference and old log-probabilities -> packed micro-batches -> updates."""

from collections.abc import Sequence
from itertools import accumulate, pairwise
from pathlib import Path

import torch
from torch import Tensor

from lens_megatron.algorithms.objectives import OBJECTIVES
from lens_megatron.batch import pack, redistribute
from lens_megatron.config import Config
from lens_megatron.policy.forward import micro_batches, response_log_probs
from lens_megatron.policy.model import reference_weights
from lens_megatron.policy.optimizer_step import optimizer_step
from lens_megatron.run import Run
from lens_megatron.supervision import non_finite
from lens_megatron.types import LossScale, Origin, Packing, Sample, UpdateStats


def train_on(run: Run, samples: Sequence[Sample], step: int) -> tuple[tuple[UpdateStats, ...], tuple[Packing, ...]]:
    """`train.updates_per_batch` optimizer steps, each on an equal share of the prompts. A collective.

    The samples of each step first move to the data-parallel ranks that train on them, so that all phases are balanced.
    """
    if run.config.debug.rollout_only:
        return (), ()
    with run.clock("exchange"):
        parts = split_by_prompt(samples, run.config.train.updates_per_batch)
        shares = [_deal(run, [samples[i] for i in part]) for part in parts]
    mine = [sample for share in shares for sample in share.samples]
    with run.clock("old_log_prob"):
        old = old_log_probs(run, mine)
    with run.clock("ref"):
        reference = reference_log_probs(run, mine)
    updates, packings = [], []
    with run.clock("update_actor"):
        if len(shares) > 1:
            run.policy.guard.keep_copy()
        bounds = pairwise(accumulate((len(share.samples) for share in shares), initial=0))
        for number, (start, stop) in enumerate(bounds):
            rows = mine[start:stop], old[start:stop], reference[start:stop]
            stats, counts = _update_on(run, *rows)
            updates.append(stats)
            packings.append(Packing(*counts, shares[number].imbalance))
            if stats.skipped and run.mesh.model_rank == 0:
                name = f"step_{step:06d}_update_{number}_rank_{run.mesh.rank:05d}"
                non_finite.dump(Path(run.config.run.directory) / "non_finite", name, stats, *rows)
    return tuple(updates), tuple(packings)


def old_log_probs(run: Run, samples: Sequence[Sample]) -> list[Tensor | None]:
    """Per sample, log pi_old of its response under the prompt that generated it; None where it need not be computed.

    With one update per batch pi_old is the policy itself, so only rescued rows, whose prompt differs, are computed. A
    correction needs it before the loss, for all rows: one more forward pass over them, about a third of an update.
    """
    everyone = run.config.algorithm.correction != "none"
    wanted = [i for i, sample in enumerate(samples) if everyone or not on_policy(run.config, sample)]
    pairs = [(samples[i].generation_prompt, samples[i].rollout.token_ids) for i in wanted]
    values = _log_probs(run, pairs)
    found = dict(zip(wanted, values, strict=True))
    return [found.get(i) for i in range(len(samples))]


def on_policy(config: Config, sample: Sample) -> bool:
    """True where the policy that samples is the one that trains, on the same prompt: the ratio is 1."""
    several = config.train.updates_per_batch > 1 or config.algorithm.ratio_form == "acl"
    return not several and sample.rollout.origin is Origin.NATIVE


def without_on_policy(config: Config, samples: Sequence[Sample], old: Sequence[Tensor | None]) -> list[Tensor | None]:
    """`old` without the on-policy rows: rounding of two passes must not make their ratio other than 1."""
    return [None if on_policy(config, sample) else value for sample, value in zip(samples, old, strict=True)]


def reference_log_probs(run: Run, samples: Sequence[Sample]) -> list[Tensor | None]:
    """Per sample, log pi_ref of its response under the original prompt; None without a KL term."""
    if run.config.algorithm.kl_coef == 0:
        return [None] * len(samples)
    with reference_weights(run.policy):
        return list(_log_probs(run, [(s.prompt, s.rollout.token_ids) for s in samples]))


def split_by_prompt(samples: Sequence[Sample], parts: int) -> list[list[int]]:
    """Indices of samples in `parts` runs of whole prompts, as equal as they go. Consecutive samples share a prompt."""
    groups: list[list[int]] = []
    for index, sample in enumerate(samples):
        if not index or sample.prompt is not samples[index - 1].prompt:
            groups.append([])
        groups[-1].append(index)
    bounds = [round(len(groups) * part / parts) for part in range(parts + 1)]
    return [sum(groups[bounds[i] : bounds[i + 1]], []) for i in range(parts)]


def _update_on(
    run: Run, samples: list[Sample], old: list[Tensor | None], reference: list[Tensor | None]
) -> tuple[UpdateStats, tuple[int, int]]:
    """Also returns the rows of this rank's micro-batches, and how many of them are padding."""
    config = run.config
    scale = _global_scale(run, pack.count(samples))
    lengths = [len(sample.prompt) + len(sample.rollout.token_ids) for sample in samples]
    batches = pack.pack(
        samples,
        old_log_probs=without_on_policy(config, samples, old),
        trainer_log_probs=old,
        reference_log_probs=reference,
        scale=scale,
        algorithm=config.algorithm,
        max_response_length=config.rollout.max_response_length,
        parts=micro_batches(run.policy, lengths, config.train.max_tokens_per_micro_batch) or [[]],
        device=run.mesh.device,
        layout=run.policy.layout,
    )
    objective = OBJECTIVES[config.algorithm.ratio]
    stats = optimizer_step(run.policy, batches, scale, objective, config.algorithm, config.rollout.temperature)
    rows = sum(batch.sequences.bounds[-1] for batch in batches)
    return stats, (rows, rows - sum(lengths))


def _deal(run: Run, samples: Sequence[Sample]) -> redistribute.Share:
    return redistribute.redistribute(samples, run.mesh.dp_group, run.policy.bridge.config.hidden_size)


def _log_probs(run: Run, pairs: list) -> list[Tensor]:
    config = run.config
    return response_log_probs(
        run.policy,
        pairs,
        max_tokens=config.train.max_tokens_per_micro_batch,
        temperature=config.rollout.temperature,
    )


def _global_scale(run: Run, own: LossScale) -> LossScale:
    counts = torch.tensor(
        [own.response_tokens, own.sequences, own.rescued_sequences], dtype=torch.int64, device=run.mesh.device
    )
    torch.distributed.all_reduce(counts, group=run.mesh.dp_group)
    return LossScale(*counts.tolist())

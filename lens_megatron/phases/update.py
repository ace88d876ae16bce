"""Trains on a step: samples -> balanced shares -> old and reference log-probabilities -> micro-batches -> updates."""

import logging
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lens_megatron.algorithms.policy_objective import policy_objective
from lens_megatron.batch import pack, redistribute
from lens_megatron.config import Config
from lens_megatron.policy.forward import micro_batches, response_log_probs
from lens_megatron.policy.model import reference_weights
from lens_megatron.policy.optimizer_step import optimizer_step
from lens_megatron.results import Packing, UpdateStats
from lens_megatron.run import Run
from lens_megatron.supervision import non_finite
from lens_megatron.types import LossScale, MicroBatch, Sample, TrainingGroup, TrainingRow

logger = logging.getLogger(__name__)


def train_on(
    run: Run, groups: Sequence[TrainingGroup], samples: Sequence[Sample], step: int, total: int
) -> tuple[tuple[UpdateStats, ...], tuple[Packing, ...]]:
    """Makes `train.updates_per_batch` optimizer steps, each on an equal share of the groups. A collective.

    The samples of each optimizer step first move to the data-parallel ranks that train on them, so that all phases are
    balanced. An optimizer step without a single sample is left out: weights, optimizer and learning rate stay.

    Args:
        groups: those at the positions `run.places(total)` of the step's groups.
        samples: the samples of `groups`, group after group. Those with `keep=False` take no part.
        total: the number of groups of all data-parallel ranks.

    Returns:
        The statistics and the packing of each optimizer step that was made; none with `debug.rollout_only`.
    """
    if run.config.debug.rollout_only:
        return (), ()
    with run.clock("exchange"):
        shares = _shares(run, groups, samples, step, total)
    if not shares:
        return (), ()
    rows = training_rows(run, [sample for share in shares for sample in share.samples])
    updates, packings = [], []
    with run.clock("update_actor"):
        if len(shares) > 1:
            run.policy.guard.keep_copy()
        bounds = pairwise(accumulate((len(share.samples) for share in shares), initial=0))
        for number, ((start, stop), share) in enumerate(zip(bounds, shares, strict=True)):
            stats, packing = _update_on(run, rows[start:stop], share.imbalance)
            updates.append(stats)
            packings.append(packing)
            if stats.skipped and run.mesh.model_rank == 0:
                name = f"step_{step:06d}_update_{number}_rank_{run.mesh.rank:05d}"
                non_finite.dump(Path(run.config.run.directory) / "non_finite", name, stats, rows[start:stop])
    return tuple(updates), tuple(packings)


def training_rows(run: Run, samples: Sequence[Sample]) -> list[TrainingRow]:
    """Makes rows with the log-probabilities that the loss needs, by the weights before the update. A collective."""
    with run.clock("old_log_prob"):
        before = trainer_log_probs(run, samples)
    with run.clock("ref"):
        reference = reference_log_probs(run, samples)
    return [
        TrainingRow(sample, old, trainer, of_reference)
        for sample, (old, trainer), of_reference in zip(samples, before, reference, strict=True)
    ]


class LogProbsBefore(NamedTuple):
    """The log-probabilities [L] of a sample's response by the weights before the update, None where not needed."""

    old: Tensor | None
    """Under the prompt of pi_old in the ratio; None for an on-policy row."""
    trainer: Tensor | None
    """Under the prompt that generated the response."""


def trainer_log_probs(run: Run, samples: Sequence[Sample]) -> list[LogProbsBefore]:
    """Returns per sample the trainer's log-probabilities that are needed before the loss, in one pass. A collective.

    With one update per batch the update's own pass gives those of on-policy rows, so only other rows are computed. A
    correction needs them under the generating prompt for all rows, at the cost of one more forward pass: a third of an
    update. A row takes part in the pass once for each prompt that it is needed under, which is seldom more than one.
    """
    config, version = run.config, run.policy.version
    wanted = [
        (i, prompt)
        for i, sample in enumerate(samples)
        for prompt in dict.fromkeys(prompts_before(config, sample, version))
    ]
    values = _log_probs(run, [(prompt, samples[i].rollout.token_ids) for i, prompt in wanted])
    found = dict(zip(wanted, values, strict=True))
    return [
        LogProbsBefore(
            None if is_on_policy(config, sample, version) else found[i, ratio_prompt(config, sample)],
            found.get((i, sample.generation_prompt)),
        )
        for i, sample in enumerate(samples)
    ]


def prompts_before(config: Config, sample: Sample, version: int) -> Iterator[tuple[int, ...]]:
    """Yields the prompts under which the response's log-probabilities are needed before the update; equal ones too."""
    if not is_on_policy(config, sample, version):
        yield ratio_prompt(config, sample)
    if config.algorithm.correction != "none":
        yield sample.generation_prompt


def ratio_prompt(config: Config, sample: Sample) -> tuple[int, ...]:
    """Returns the prompt of pi_old in the sample's ratio, by `algorithm.rescued_ratio`."""
    return sample.prompt if config.algorithm.rescued_ratio == "original_prompt" else sample.generation_prompt


def is_on_policy(config: Config, sample: Sample, version: int) -> bool:
    """Returns whether the sample's ratio is exactly 1 in the update that follows the weights of `version`.

    It is where these weights have sampled the response, and pi_old is under the prompt that is trained on. Rows that
    older weights have sampled (`rollout.off_policy_steps`, loaded rollouts) are not on-policy: for them too pi_old is
    the policy before this update, and is computed; `algorithm.correction` accounts for the weights that sampled them.
    Loaded rollouts are on-policy if they were saved with this version.
    """
    several_updates = config.train.updates_per_batch > 1 or config.algorithm.ratio_form == "acl"
    same_prompt = ratio_prompt(config, sample) == sample.prompt
    return same_prompt and sample.rollout.weight_version == version and not several_updates


def reference_log_probs(run: Run, samples: Sequence[Sample]) -> list[Tensor | None]:
    """Returns per sample [L] log pi_ref of its response under the original prompt, or None without a KL term."""
    if run.config.algorithm.kl_coef == 0:
        return [None] * len(samples)
    with reference_weights(run.policy):
        return list(_log_probs(run, [(s.prompt, s.rollout.token_ids) for s in samples]))


def split_groups(sizes: Sequence[int], positions: Sequence[int], total: int, parts: int) -> list[slice]:
    """Cuts the groups of a step into `parts` runs of whole groups, and returns the samples of this rank's in each.

    The numbers of groups of the runs are as equal as possible. They do not depend on which rank holds which group.

    Args:
        sizes: the number of samples of each of this rank's groups.
        positions: their positions among the `total` groups of the step, ascending.
    """
    ends = [0, *accumulate(sizes)]
    bounds = [ends[bisect_left(positions, round(total * part / parts))] for part in range(parts + 1)]
    return [slice(start, stop) for start, stop in pairwise(bounds)]


def _shares(
    run: Run, groups: Sequence[TrainingGroup], samples: Sequence[Sample], step: int, total: int
) -> list[redistribute.Share]:
    """Returns what this rank trains on in each optimizer step that has a sample on any rank. A collective."""
    sizes, wanted = [len(group.rollouts) for group in groups], run.config.train.updates_per_batch
    parts = split_groups(sizes, run.places(total), total, wanted)
    every = [_redistribute(run, [sample for sample in samples[part] if sample.keep]) for part in parts]
    shares = [share for share in every if share.total]
    if run.is_main and len(shares) < wanted:
        rollouts = sum(share.total for share in every)
        logger.warning(
            f"step {step}: {len(shares)} of {wanted} updates are made, since no other has a rollout to train on: the "
            f"loss has {rollouts} rollouts of {total} groups; the weights before are of version {run.policy.version}"
        )
    return shares


@dataclass(frozen=True, slots=True)
class PackedUpdate:
    """The micro-batches of one optimizer step on this data-parallel rank."""

    batches: tuple[MicroBatch, ...]
    scale: LossScale
    parts: tuple[Sequence[int], ...]
    """The places of the rows of each micro-batch; empty for one that only keeps step with other ranks."""


def pack_update(run: Run, rows: Sequence[TrainingRow]) -> PackedUpdate:
    """Packs this rank's rows for one optimizer step on them and those of the other ranks. A collective."""
    config = run.config
    scale = _global_scale(run, pack.count([row.sample for row in rows]))
    pairs = [(row.sample.prompt, row.sample.rollout.token_ids) for row in rows]
    parts = micro_batches(run.policy, pairs, config.train.max_tokens_per_micro_batch) or [[]]
    batches = pack.pack(
        rows,
        scale=scale,
        algorithm=config.algorithm,
        max_response_length=config.rollout.max_response_length,
        parts=parts,
        device=run.mesh.device,
        layout=run.policy.layout,
    )
    return PackedUpdate(tuple(batches), scale, tuple(parts))


def _update_on(run: Run, rows: Sequence[TrainingRow], imbalance: float) -> tuple[UpdateStats, Packing]:
    """Makes one optimizer step on this rank's rows and those of the other ranks."""
    config, update = run.config, pack_update(run, rows)
    batches, scale = update.batches, update.scale
    objective = policy_objective(config.algorithm, run.methods.objective)
    stats = optimizer_step(run.policy, batches, scale, objective, config.algorithm, config.rollout.temperature)
    packed = sum(batch.sequences.bounds[-1] for batch in batches)
    filled = sum(batch.sequences.tokens for batch, part in zip(batches, update.parts, strict=True) if part)
    return stats, Packing(rows=packed, padding=packed - filled, imbalance=imbalance)


def _redistribute(run: Run, samples: Sequence[Sample]) -> redistribute.Share:
    return redistribute.redistribute(
        samples,
        run.mesh.dp_group,
        run.policy.bridge.config.hidden_size,
        by_prompt=run.policy.shares_prompts,
    )


def _log_probs(run: Run, pairs: Sequence[pack.Pair]) -> list[Tensor]:
    config = run.config
    return response_log_probs(
        run.policy,
        pairs,
        max_tokens=config.train.max_tokens_per_micro_batch,
        temperature=config.rollout.temperature,
    )


def _global_scale(run: Run, own: LossScale) -> LossScale:
    """Returns the sum of all data-parallel ranks' counts. A collective."""
    counts = torch.tensor(
        [own.response_tokens, own.sequences, own.rescued_sequences], dtype=torch.int64, device=run.mesh.device
    )
    torch.distributed.all_reduce(counts, group=run.mesh.dp_group)
    return LossScale(*counts.tolist())

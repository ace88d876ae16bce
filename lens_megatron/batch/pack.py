"""Packs samples and their log-probabilities into micro-batches with all weights and denominators, by pure functions."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import groupby

import torch
from torch import Tensor
from torch.nn.functional import pad

from lens_megatron.algorithms.aggregation import AGGREGATIONS
from lens_megatron.algorithms.corrections import CORRECTIONS, Correction, uncorrected
from lens_megatron.config import AlgorithmConfig
from lens_megatron.types import (
    LossScale,
    MicroBatch,
    Origin,
    Sample,
    SequenceBatch,
    SequenceLayout,
    TokenTerms,
    TrainingRow,
)

Pair = tuple[tuple[int, ...], tuple[int, ...]]
"""Token ids of a prompt and of its response."""


ONE_RANK = SequenceLayout()


def count(samples: Sequence[Sample]) -> LossScale:
    """Returns this rank's share of the denominators; add the ranks' shares up before `pack`."""
    return LossScale(
        response_tokens=sum(len(s.rollout.token_ids) for s in samples),
        sequences=len(samples),
        rescued_sequences=sum(_is_rescued(s) for s in samples),
    )


def pack(
    rows: Sequence[TrainingRow],
    *,
    scale: LossScale,
    algorithm: AlgorithmConfig,
    max_response_length: int,
    parts: Sequence[Sequence[int]],
    device: torch.device,
    layout: SequenceLayout = ONE_RANK,
) -> list[MicroBatch]:
    """Makes a micro-batch of the rows of each of `parts`, which may be empty: a rank must take part in every one.

    Args:
        parts: indices into `rows`, from lens_megatron.batch.balance.
        scale: global counts, which make the sum of all micro-batches' losses the loss.

    Raises:
        ValueError: a correction is asked for, and a row lacks the trainer's log-probabilities.
    """
    return [
        _micro_batch([rows[i] for i in part], scale, algorithm, max_response_length, device, layout) for part in parts
    ]


def make_sequences(pairs: Sequence[Pair], device: torch.device, layout: SequenceLayout = ONE_RANK) -> SequenceBatch:
    """Lays prompts with their responses end to end, padded only as `layout` needs, and takes this rank's part.

    With `layout.shares_prompts` the prompt of pairs that follow each other has its rows once, with the first of them.
    """
    if layout.shares_prompts:
        return _extend(_make_sharing_sequences(pairs, device), layout)
    bounds, targets, own, positions, inputs, places = [0], [], [], [], [], []
    for prompt, response in pairs:
        tokens = torch.tensor(prompt + response, dtype=torch.int64)
        length = -(-len(tokens) // layout.alignment) * layout.alignment
        held = _rows_held(length, layout)
        row_of = torch.full((length,), -1)
        row_of[held] = bounds[-1] // layout.context_parallel_size + torch.arange(len(held))
        inputs.append(pad(tokens, (0, length - len(tokens)))[held])
        places.append(held)
        predicting = row_of[len(prompt) - 1 : len(tokens) - 1]
        mine = (predicting >= 0).nonzero()[:, 0]
        positions.append(predicting[mine])
        targets.append(tokens[len(prompt) :][mine])
        own.append(mine + sum(len(earlier) for _, earlier in pairs[: len(bounds) - 1]))
        bounds.append(bounds[-1] + length)
    return _extend(
        SequenceBatch(
            torch.cat(inputs)[None].to(device),
            torch.cat(places)[None].to(device),
            tuple(bounds),
            torch.cat(targets).to(device),
            torch.cat(positions).to(device),
            torch.cat(own).to(device) if layout.context_parallel_size > 1 else None,
            tuple(len(response) for _, response in pairs),
            sum(len(prompt) + len(response) for prompt, response in pairs),
        ),
        layout,
    )


def _make_sharing_sequences(pairs: Sequence[Pair], device: torch.device) -> SequenceBatch:
    bounds, prefixes, inputs, places, positions = [0], [], [], [], []
    for prompt, alike in groupby(pairs, key=lambda pair: pair[0]):
        first = bounds[-1]
        begin = first + len(prompt)  # of the response
        for number, (_, response) in enumerate(alike):
            own = response if number else prompt + response
            inputs.append(torch.tensor(own, dtype=torch.int64))
            places.append(torch.arange(len(prompt) + len(response) - len(own), len(prompt) + len(response)))
            begin = bounds[-1] if number else begin
            if response:
                positions.append(torch.tensor([first + len(prompt) - 1, *range(begin, begin + len(response) - 1)]))
            prefixes.append((first, first + len(prompt)) if number else (0, 0))
            bounds.append(bounds[-1] + len(own))
    nothing = torch.empty(0, dtype=torch.int64)
    return SequenceBatch(
        torch.cat(inputs)[None].to(device),
        torch.cat(places)[None].to(device),
        tuple(bounds),
        torch.tensor([token for _, response in pairs for token in response], dtype=torch.int64).to(device),
        torch.cat([nothing, *positions]).to(device),
        None,
        tuple(len(response) for _, response in pairs),
        bounds[-1],
        tuple(prefixes) if any(prefix != (0, 0) for prefix in prefixes) else (),
    )


def chunks_held(rank: int, size: int) -> tuple[int, int]:
    """Returns which two of a sequence's 2 * size chunks a context-parallel rank holds, as Megatron deals them out.

    They are mirror images of each other, so that all ranks attend to equally many keys.
    """
    return rank, 2 * size - 1 - rank


def _rows_held(length: int, layout: SequenceLayout) -> Tensor:
    """Returns the positions of a padded sequence that this context-parallel rank holds."""
    size = layout.context_parallel_size
    if size == 1:
        return torch.arange(length)
    chunks = torch.arange(length).view(2 * size, -1)
    return torch.cat([chunks[index] for index in chunks_held(layout.context_parallel_rank, size)])


def _extend(batch: SequenceBatch, layout: SequenceLayout) -> SequenceBatch:
    """Adds one sequence of padding if the rows do not divide among sequence-parallel ranks."""
    missing = -batch.input_ids.shape[1] % layout.sequence_parallel_size
    if not missing:
        return batch
    if missing % 2 and layout.context_parallel_size > 1:
        missing += layout.sequence_parallel_size  # each context-parallel rank holds two chunks of equal size
    total = batch.bounds[-1] + missing * layout.context_parallel_size
    return replace(
        batch,
        input_ids=pad(batch.input_ids, (0, missing)),
        position_ids=pad(batch.position_ids, (0, missing)),
        bounds=(*batch.bounds, total),
        prefixes=(*batch.prefixes, (0, 0)) if batch.prefixes else (),
    )


def _micro_batch(
    rows: Sequence[TrainingRow],
    scale: LossScale,
    algorithm: AlgorithmConfig,
    limit: int,
    device: torch.device,
    layout: SequenceLayout,
) -> MicroBatch:
    """Makes one micro-batch. Without any rows it is padding: the rank still takes part in the collectives."""
    samples = [row.sample for row in rows]
    lengths = [len(sample.rollout.token_ids) for sample in samples]

    def spread(numbers: Iterable[Tensor | float], dtype: torch.dtype = torch.float32) -> Tensor:
        """Lays one number, or one tensor of its tokens, per sample end to end: [T]."""
        parts = [torch.as_tensor(x, dtype=dtype).expand(n) for x, n in zip(numbers, lengths, strict=True)]
        return torch.cat([torch.empty(0, dtype=dtype), *parts]).to(device)

    shares = [AGGREGATIONS[algorithm.aggregation](length, scale, limit) for length in lengths]
    weighted = [_weight_and_old(row.sample, row.old_log_probs, algorithm) for row in rows]
    corrections = [_correction(row, algorithm) for row in rows]
    terms = TokenTerms(
        advantages=spread(sample.advantage for sample in samples),
        policy_weights=spread(
            correction.weights * weight * share
            for correction, (weight, _), share in zip(corrections, weighted, shares, strict=True)
        ),
        kl_weights=spread(algorithm.kl_coef * share for share in shares),
        entropy_weights=spread(algorithm.entropy_coef * share for share in shares),
        imitation_weights=spread(_imitation_weight(sample, scale, algorithm) for sample in samples),
        old_log_probs=spread(old for _, old in weighted),
        reference_log_probs=spread(_or_default(row.reference_log_probs, 0.0) for row in rows),
        rescued=spread((_is_rescued(sample) for sample in samples), torch.bool),
        engine_log_probs=spread(torch.tensor(sample.rollout.log_probs) for sample in samples),
        trainer_log_probs=spread(_or_default(row.trainer_log_probs, math.nan) for row in rows),
        corrections=spread(correction.weights for correction in corrections),
        limited=spread((correction.limited for correction in corrections), torch.bool),
        first=spread((sum(lengths[:i]) for i in range(len(lengths))), torch.int64),
    )
    pairs = [(sample.prompt, sample.rollout.token_ids) for sample in samples]
    return MicroBatch(make_sequences(pairs or [((0, 0), ())], device, layout), terms)


def _weight_and_old(sample: Sample, old: Tensor | None, algorithm: AlgorithmConfig) -> tuple[float, Tensor | float]:
    """Returns w~ and log pi_old; in the acl form, w~ divides pi_old instead of multiplying the loss."""
    if old is None:
        return sample.weight, math.nan
    if algorithm.ratio_form == "acl":
        return 1.0, old + math.log(max(sample.weight, 1e-6))
    return sample.weight, old


def _or_default(log_probs: Tensor | None, default: float) -> Tensor | float:
    return default if log_probs is None else log_probs


def _correction(row: TrainingRow, algorithm: AlgorithmConfig) -> Correction:
    engine = torch.tensor(row.sample.rollout.log_probs, dtype=torch.float64)
    if algorithm.correction == "none":
        return uncorrected(engine, 0.0, 0.0)
    if row.trainer_log_probs is None:
        raise ValueError(f"algorithm.correction={algorithm.correction} needs the trainer's log-probabilities, got None")
    bounds = algorithm.correction_low, algorithm.correction_high
    return CORRECTIONS[algorithm.correction](row.trainer_log_probs.double() - engine, *bounds)


def _imitation_weight(sample: Sample, scale: LossScale, algorithm: AlgorithmConfig) -> float:
    if not _is_rescued(sample):
        return 0.0
    return algorithm.imitation_coef / (scale.rescued_sequences * len(sample.rollout.token_ids))


def _is_rescued(sample: Sample) -> bool:
    return sample.rollout.origin is Origin.PURIFIED

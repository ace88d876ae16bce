"""Samples with their log-probabilities -> padded micro-batches with every weight and denominator filled in. Pure."""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from lens_megatron.algorithms.aggregation import AGGREGATIONS
from lens_megatron.config import AlgorithmConfig
from lens_megatron.types import LossScale, MicroBatch, Origin, Sample, SequenceBatch, TokenTerms

Pair = tuple[tuple[int, ...], tuple[int, ...]]
"""Token ids of a prompt and of its response."""


def count(samples: Sequence[Sample]) -> LossScale:
    """This rank's share of the denominators; add the ranks' shares up before `pack`."""
    return LossScale(
        response_tokens=sum(len(s.rollout.token_ids) for s in samples),
        sequences=len(samples),
        rescued_sequences=sum(_is_rescued(s) for s in samples),
    )


def pack(
    samples: Sequence[Sample],
    *,
    old_log_probs: Sequence[Tensor | None],
    reference_log_probs: Sequence[Tensor | None],
    scale: LossScale,
    algorithm: AlgorithmConfig,
    max_response_length: int,
    micro_batch_size: int,
    device: torch.device,
) -> list[MicroBatch]:
    """Cuts `samples`, in order, into micro-batches of at most `micro_batch_size` sequences; at least one micro-batch.

    Args:
        old_log_probs: per sample [response tokens] under the prompt that generated it; None marks it on-policy.
        reference_log_probs: per sample [response tokens] under the original prompt; None where no KL is asked for.
        scale: global counts, which make the sum of all micro-batches' losses the loss.
    """
    values = list(zip(samples, old_log_probs, reference_log_probs, strict=True))
    parts = [values[i : i + micro_batch_size] for i in range(0, len(values), micro_batch_size)]
    return [_micro_batch(part, scale, algorithm, max_response_length, device) for part in parts or [[]]]


def make_sequences(pairs: Sequence[Pair], device: torch.device) -> SequenceBatch:
    """Right-pads prompt + response, and locates the response's tokens. At least one pair."""
    count, length = len(pairs), max(len(prompt) + len(response) for prompt, response in pairs)
    input_ids = torch.zeros(count, length, dtype=torch.int64)
    for sequence, (prompt, response) in enumerate(pairs):
        input_ids[sequence, : len(prompt) + len(response)] = torch.tensor(prompt + response)
    positions = [
        position * count + sequence  # the model's rows are [S, B]
        for sequence, (prompt, response) in enumerate(pairs)
        for position in range(len(prompt) - 1, len(prompt) + len(response) - 1)
    ]
    targets = [token for _, response in pairs for token in response]
    return SequenceBatch(
        input_ids.to(device),
        torch.tensor(targets, dtype=torch.int64).to(device),
        torch.tensor(positions, dtype=torch.int64).to(device),
        tuple(len(response) for _, response in pairs),
    )


def _micro_batch(
    values: Sequence[tuple[Sample, Tensor | None, Tensor | None]],
    scale: LossScale,
    algorithm: AlgorithmConfig,
    limit: int,
    device: torch.device,
) -> MicroBatch:
    """Of (sample, old, reference) triples. None at all: a rank without samples still takes part in the collectives."""
    samples = [sample for sample, _, _ in values]
    lengths = [len(sample.rollout.token_ids) for sample in samples]

    def spread(numbers: Iterable[Tensor | float], dtype: torch.dtype = torch.float32) -> Tensor:
        """One number, or one tensor of its tokens, per sample -> [T]."""
        parts = [torch.as_tensor(x, dtype=dtype).expand(n) for x, n in zip(numbers, lengths, strict=True)]
        return torch.cat([torch.empty(0, dtype=dtype), *parts]).to(device)

    shares = [AGGREGATIONS[algorithm.aggregation](length, scale, limit) for length in lengths]
    weighted = [_weight_and_old(sample, old, algorithm) for sample, old, _ in values]
    terms = TokenTerms(
        advantages=spread(sample.advantage for sample in samples),
        policy_weights=spread(weight * share for (weight, _), share in zip(weighted, shares, strict=True)),
        kl_weights=spread(algorithm.kl_coef * share for share in shares),
        entropy_weights=spread(algorithm.entropy_coef * share for share in shares),
        imitation_weights=spread(_imitation_weight(sample, scale, algorithm) for sample in samples),
        old_log_probs=spread(old for _, old in weighted),
        reference_log_probs=spread(0.0 if reference is None else reference for _, _, reference in values),
        rescued=spread((_is_rescued(sample) for sample in samples), torch.bool),
        first=spread((sum(lengths[:i]) for i in range(len(lengths))), torch.int64),
    )
    pairs = [(sample.prompt, sample.rollout.token_ids) for sample in samples]
    return MicroBatch(make_sequences(pairs or [((0, 0), ())], device), terms)


def _weight_and_old(sample: Sample, old: Tensor | None, algorithm: AlgorithmConfig) -> tuple[float, Tensor | float]:
    """w~ and log pi_old; in the acl form, w~ divides pi_old instead of multiplying the loss."""
    if old is None:
        return sample.weight, math.nan
    if algorithm.ratio_form == "acl":
        return 1.0, old + math.log(max(sample.weight, 1e-6))
    return sample.weight, old


def _imitation_weight(sample: Sample, scale: LossScale, algorithm: AlgorithmConfig) -> float:
    if not _is_rescued(sample):
        return 0.0
    return algorithm.imitation_coef / (scale.rescued_sequences * len(sample.rollout.token_ids))


def _is_rescued(sample: Sample) -> bool:
    return sample.rollout.origin is Origin.RESCUED

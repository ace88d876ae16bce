"""Samples with their log-probabilities -> padded micro-batches with every weight and denominator filled in. Pure."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lens_megatron.algorithms.aggregation import AGGREGATIONS
from lens_megatron.config import AlgorithmConfig
from lens_megatron.types import LossScale, MicroBatch, Origin, Sample, SequenceBatch


def count(samples: Sequence[Sample]) -> LossScale:
    """This rank's share of the denominators; add the ranks' shares up before `pack`."""
    return LossScale(
        response_tokens=sum(len(s.rollout.token_ids) for s in samples),
        sequences=len(samples),
        rescued_sequences=sum(s.rollout.origin is Origin.RESCUED for s in samples),
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
    rows = [
        _row(sample, old, reference, scale, algorithm, max_response_length)
        for sample, old, reference in zip(samples, old_log_probs, reference_log_probs, strict=True)
    ]
    batches = [rows[i : i + micro_batch_size] for i in range(0, len(rows), micro_batch_size)]
    return [_stack(batch, device) for batch in batches] or [_empty(device)]


def _row(
    sample: Sample,
    old: Tensor | None,
    reference: Tensor | None,
    scale: LossScale,
    algorithm: AlgorithmConfig,
    limit: int,
) -> MicroBatch:
    """A micro-batch of one sequence, unpadded."""
    response = sample.rollout.token_ids
    rescued = sample.rollout.origin is Origin.RESCUED
    tokens = torch.tensor(sample.prompt + response)
    start, length = len(sample.prompt) - 1, len(tokens)
    targets = torch.full((length,), -1, dtype=torch.int64)
    targets[start:-1] = tokens[start + 1 :]

    def spread(values: Tensor | float) -> Tensor:
        row = torch.zeros(length)
        row[start:-1] = values
        return row[None]

    share = AGGREGATIONS[algorithm.aggregation](len(response), scale, limit)
    weight, old_values = sample.weight, math.nan if old is None else old
    if algorithm.ratio_form == "acl" and old is not None:
        weight, old_values = 1.0, old + math.log(max(sample.weight, 1e-6))
    imitation = algorithm.imitation_coef / (scale.rescued_sequences * len(response)) if rescued else 0.0
    return MicroBatch(
        sequences=SequenceBatch(tokens[None], targets[None]),
        advantages=spread(sample.advantage),
        policy_weights=spread(weight * share),
        kl_weights=spread(algorithm.kl_coef * share),
        entropy_weights=spread(algorithm.entropy_coef * share),
        imitation_weights=spread(imitation),
        old_log_probs=spread(old_values),
        reference_log_probs=spread(0.0 if reference is None else reference),
        rescued=torch.tensor([rescued]),
    )


def _stack(rows: Sequence[MicroBatch], device: torch.device) -> MicroBatch:
    length = max(row.sequences.input_ids.shape[1] for row in rows)

    def join(tensors: list[Tensor], fill: int = 0) -> Tensor:
        padded = [torch.nn.functional.pad(t, (0, length - t.shape[1]), value=fill) for t in tensors]
        return torch.cat(padded).to(device)

    return MicroBatch(
        sequences=SequenceBatch(
            join([row.sequences.input_ids for row in rows]), join([row.sequences.target_ids for row in rows], fill=-1)
        ),
        advantages=join([row.advantages for row in rows]),
        policy_weights=join([row.policy_weights for row in rows]),
        kl_weights=join([row.kl_weights for row in rows]),
        entropy_weights=join([row.entropy_weights for row in rows]),
        imitation_weights=join([row.imitation_weights for row in rows]),
        old_log_probs=join([row.old_log_probs for row in rows]),
        reference_log_probs=join([row.reference_log_probs for row in rows]),
        rescued=torch.cat([row.rescued for row in rows]).to(device),
    )


def _empty(device: torch.device) -> MicroBatch:
    """A rank without samples still takes part in the step's collectives."""
    nothing = torch.zeros(1, 2)
    ids = torch.zeros(1, 2, dtype=torch.int64)
    row = MicroBatch(
        SequenceBatch(ids, ids - 1),
        nothing,
        nothing,
        nothing,
        nothing,
        nothing,
        nothing,
        nothing,
        torch.tensor([False]),
    )
    return _stack([row], device)

"""Weighs the loss of each response token, with global denominators (algorithms as in verl)."""

from collections.abc import Callable

from lens_megatron.types import LossScale

Aggregation = Callable[[int, LossScale, int], float]
"""It takes (tokens of this response, global counts, max_response_length) and returns the weight of each token."""

AGGREGATIONS: dict[str, Aggregation] = {
    "token-mean": lambda tokens, scale, limit: 1 / scale.response_tokens,
    "seq-mean-token-mean": lambda tokens, scale, limit: 1 / (scale.sequences * tokens),
    "seq-mean-token-sum": lambda tokens, scale, limit: 1 / scale.sequences,
    "seq-mean-token-sum-norm": lambda tokens, scale, limit: 1 / (scale.sequences * limit),
}

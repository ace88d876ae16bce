"""What a server answers is a completion of the expected weights, or it is refused."""

import math

import pytest

from lens_megatron.rollout.engine import Completion, Request
from lens_megatron.rollout.servers.client import Expected, ServerError, completion_of


def answer(**change: object) -> dict:
    choice = {
        "token_ids": [5, 6, 1],
        "finish_reason": "stop",
        "weight_versions": [{"version": "a-1", "start": 0, "end": 3}],
        "logprobs": log_probs(-0.5, -0.5, -0.5),
    }
    return {"choices": [choice | change]}


def log_probs(*values: float) -> dict:
    return {"content": [{"token_id": t, "logprob": value} for t, value in zip((5, 6, 1), values, strict=False)]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"token_ids": [5, 600, 1]}, "tokens outside 0..99"),
        ({"token_ids": [5, 1, 1]}, "3 tokens, and log-probabilities of 3 others"),
        ({"token_ids": []}, "weights"),
        ({"token_ids": None}, "not a completion"),
        ({"logprobs": None}, "not a completion"),
        ({"logprobs": log_probs(-0.5, -0.5)}, "3 tokens, and log-probabilities of 2 others"),
        ({"logprobs": log_probs(-0.5, math.nan, -0.5)}, "log-probability of nan"),
        ({"logprobs": log_probs(-0.5, -9999.0, -0.5)}, "log-probability of -9999"),
        ({"logprobs": log_probs(-0.5, 0.1, -0.5)}, "log-probability of 0.1"),
        ({"finish_reason": "length"}, "ended with 'length' after 3 of 8 tokens"),
        ({"finish_reason": "abort"}, "ended with 'abort'"),
        ({"weight_versions": [{"version": "a-0", "start": 0, "end": 3}]}, "a-0"),
        ({"weight_versions": [{"version": v, "start": 0, "end": 3} for v in ("a-0", "a-1")]}, "a-0"),
        ({"weight_versions": None}, "not a completion"),
    ],
)
def test_answers_that_are_no_completion_of_these_weights_are_refused(change: dict, message: str):
    request, expected = Request(1, (5, 6), 8, 1.0, 0), Expected(100, frozenset({1}), "a-1", 1)
    assert completion_of(answer(), request, expected) == Completion(1, (5, 6, 1), (-0.5,) * 3, True, 1)
    with pytest.raises(ServerError, match=message):
        completion_of(answer(**change), request, expected)

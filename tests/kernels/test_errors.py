"""A wrong argument is a ValueError that names it, says what came, and what is needed."""

import pytest
import torch
from lens_kernels import (
    interference_scores,
    linear_policy_loss,
    linear_token_logprobs,
    policy_loss,
    select_interference_tokens,
    token_logprobs,
)

LOGITS = torch.zeros(3, 5)
IDS = torch.tensor([0, 1, 2])
HIDDEN, WEIGHT = torch.zeros(3, 4), torch.zeros(5, 4)
BOUNDS = torch.tensor([0, 3])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"logits": LOGITS.double()}, "logits: got torch.float64, need float32, bfloat16 or float16"),
        ({"logits": LOGITS.long()}, "logits: got torch.int64"),
        ({"logits": torch.zeros(3, 0)}, r"logits: got shape \(3, 0\), need at least one column"),
        ({"logits": [1.0]}, "logits: got list, need a torch.Tensor"),
        ({"token_ids": IDS[:2]}, r"token_ids: got shape \(2,\), need one id per row, \(3,\)"),
        ({"token_ids": IDS.float()}, "token_ids: got torch.float32, need int64 or int32"),
        ({"token_ids": IDS.to("meta")}, "token_ids: got device meta, need device cpu"),
        ({"temperature": 0.0}, "temperature: got 0.0, need a finite number > 0"),
        ({"temperature": -1}, "temperature: got -1"),
        ({"temperature": float("nan")}, "temperature: got nan"),
        ({"temperature": torch.tensor([1.0, 0.0, 1.0])}, "temperature: got a tensor with values <= 0"),
        ({"temperature": torch.ones(2)}, r"temperature: got shape \(2,\), need a shape that broadcasts"),
        ({"temperature": None}, "temperature: got None"),
        ({"logit_softcap": 0.0}, "logit_softcap: got 0.0, need a finite number > 0, or None"),
        ({"logit_softcap": torch.ones(1)}, "logit_softcap: got tensor"),
        ({"valid_vocab_size": 0}, "valid_vocab_size: got 0, need an integer >= 1"),
        ({"valid_vocab_size": 6}, "valid_vocab_size: got 6, need at most the 5 columns"),
    ],
)
def test_arguments_of_all_logit_functions(changed, message):
    arguments = {"logits": LOGITS, "token_ids": IDS} | changed
    with pytest.raises(ValueError, match=message):
        token_logprobs(**arguments)
    with pytest.raises(ValueError, match=message):
        policy_loss(**arguments, old_logprobs=None, advantages=1.0)
    arguments["policy_logits"] = arguments.pop("logits")
    with pytest.raises(ValueError, match=message):
        interference_scores(**arguments, reference_logprobs=torch.zeros(3))


def test_expanded_logits_cannot_be_overwritten():
    with pytest.raises(ValueError, match="logits: got strides .* no expanded axis with inplace_backward=True"):
        token_logprobs(torch.zeros(1, 5).expand(3, 5), IDS, inplace_backward=True)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"advantages": None}, "advantages: got None"),
        (
            {"advantages": torch.zeros(4)},
            r"advantages: got shape \(4,\), need a shape that broadcasts to the rows \(3,\)",
        ),
        ({"advantages": torch.zeros(3, 1)}, r"advantages: got shape \(3, 1\)"),
        ({"advantages": IDS}, "advantages: got torch.int64, need a floating-point dtype"),
        ({"advantages": torch.zeros(3, device="meta")}, "advantages: got device meta"),
        ({"old_logprobs": torch.zeros(2)}, "old_logprobs: got shape"),
        ({"old_logprobs": "none"}, "old_logprobs: got str"),
        ({"policy_weights": torch.zeros(2)}, "policy_weights: got shape"),
        ({"entropy_weights": torch.zeros(2)}, "entropy_weights: got shape"),
        ({"kl_weights": 0.1}, "reference_logprobs .needed by kl_weights.: got NoneType"),
        ({"clip_low": -0.1}, "clip_low: got -0.1, need a number >= 0"),
        ({"clip_high": float("nan")}, "clip_high: got nan"),
        ({"dual_clip": 1.0}, "dual_clip: got 1.0, need a number > 1"),
        ({"kl_limit": 0.0}, "kl_limit: got 0.0, need a number > 0, or None for no limit"),
        ({"kl_limit": float("nan")}, "kl_limit: got nan"),
    ],
)
def test_loss_arguments(changed, message):
    arguments = {"old_logprobs": None, "advantages": torch.zeros(3)} | changed
    with pytest.raises(ValueError, match=message):
        policy_loss(LOGITS, IDS, **arguments)
    with pytest.raises(ValueError, match=message):
        linear_policy_loss(HIDDEN, WEIGHT, IDS, **arguments)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"kl_estimator": "k4"}, "kl_estimator: got 'k4', need 'k1', 'k2' or 'k3'"),
        ({"objective": lambda lp, h, part: lp}, "advantages: got a value next to objective"),
        ({"objective": lambda lp, h, part: lp.sum(), "advantages": None}, "objective: got losses of shape"),
    ],
)
def test_policy_loss_arguments(changed, message):
    with pytest.raises(ValueError, match=message):
        policy_loss(LOGITS, IDS, **({"advantages": 1.0} | changed))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({}, "reference_logits, reference_logprobs: got neither, need exactly one"),
        ({"reference_logits": LOGITS, "reference_logprobs": torch.zeros(3)}, "got both, need exactly one"),
        ({"reference_logits": torch.zeros(3, 6)}, r"reference_logits: got shape \(3, 6\), need \(3, 5\)"),
        ({"reference_logits": LOGITS.double()}, "reference_logits: got torch.float64"),
        ({"reference_logprobs": torch.zeros(5)}, "reference_logprobs: got shape"),
    ],
)
def test_score_arguments(changed, message):
    with pytest.raises(ValueError, match=message):
        interference_scores(LOGITS, IDS, **changed)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"weight": torch.zeros(5, 3)}, r"weight: got shape \(5, 3\), need \[V, 4\]"),
        ({"weight": torch.zeros(4)}, r"weight: got shape \(4,\)"),
        ({"weight": WEIGHT.double()}, "weight: got torch.float64"),
        ({"weight": WEIGHT.to("meta")}, "weight: got device meta"),
        ({"hidden": HIDDEN.long()}, "hidden: got torch.int64"),
        ({"bias": torch.zeros(4)}, r"bias: got shape \(4,\), need \[5\]"),
        ({"bias": torch.zeros(5).long()}, "bias: got torch.int64"),
        ({"token_ids": IDS[:2]}, r"token_ids: got shape \(2,\), need one id per row, \(3,\)"),
        ({"rows": IDS[:2]}, r"token_ids: got shape \(3,\), need one id per row, \(2,\)"),
        ({"rows": IDS.int()}, "rows: got torch.int32, need int64"),
        ({"rows": IDS[None]}, r"rows: got shape \(1, 3\), need one dimension"),
        ({"rows": torch.tensor([0, 1, 3])}, "rows: got indices 0 to 3, need indices within 0 to 2"),
        ({"rows": torch.tensor([0, -1, 2])}, "rows: got indices -1 to 2"),
        ({"chunk_rows": 0}, "chunk_rows: got 0, need an integer >= 1"),
        ({"chunk_rows": 1.5}, "chunk_rows: got 1.5"),
        ({"temperature": 0}, "temperature: got 0"),
        ({"valid_vocab_size": 6}, "valid_vocab_size: got 6"),
    ],
)
def test_linear_arguments(changed, message):
    arguments = {"hidden": HIDDEN, "weight": WEIGHT, "token_ids": IDS} | changed
    with pytest.raises(ValueError, match=message):
        linear_token_logprobs(**arguments)
    with pytest.raises(ValueError, match=message):
        linear_policy_loss(**arguments, advantages=1.0)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"accumulate_into": torch.zeros(5, 4).bfloat16()},
            r"accumulate_into: got torch.bfloat16 .* need float32 \(5, 4\)",
        ),
        ({"accumulate_into": torch.zeros(4, 4)}, r"accumulate_into: got torch.float32 \(4, 4\)"),
        ({"accumulate_into": torch.zeros(5, 4)}, "accumulate_into: got a weight with requires_grad=False"),
        ({"objective": lambda lp, h, part: lp}, "advantages: got a value next to objective"),
        ({"objective": lambda lp, h, part: lp.sum(), "advantages": None}, "objective: got losses of shape"),
        ({"objective": lambda lp, h, part: 1.0, "advantages": None}, "objective: got float, need a torch.Tensor"),
    ],
)
def test_linear_loss_arguments(changed, message):
    with pytest.raises(ValueError, match=message):
        linear_policy_loss(HIDDEN, WEIGHT, IDS, **({"advantages": 1.0} | changed))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"ratio": -0.1}, "ratio: got -0.1, need a number from 0 to 1"),
        ({"ratio": 1.01}, "ratio: got 1.01"),
        ({"ratio": float("nan")}, "ratio: got nan"),
        ({"min_score": float("nan")}, "min_score: got nan"),
        ({"scores": torch.zeros(1, 3)}, r"scores: got shape \(1, 3\)"),
        ({"scores": IDS}, "scores: got torch.int64"),
        ({"cu_seqlens": BOUNDS.float()}, "cu_seqlens: got torch.float32"),
        ({"cu_seqlens": torch.zeros(0, dtype=torch.long)}, r"cu_seqlens: got shape \(0,\)"),
        ({"cu_seqlens": torch.tensor([1, 3])}, r"cu_seqlens: got \[1, 3\], need offsets that start at 0"),
        ({"cu_seqlens": torch.tensor([0, 3, 2])}, "cu_seqlens: got .* never fall"),
        ({"cu_seqlens": torch.tensor([0, 4])}, "cu_seqlens: got last offset 4, need at most 3 tokens"),
        ({"eligible": torch.ones(3)}, "eligible: got torch.float32, need bool"),
        ({"eligible": torch.ones(2, dtype=torch.bool)}, r"eligible: got shape \(2,\), need \(3,\)"),
    ],
)
def test_selection_arguments(changed, message):
    arguments = {"scores": torch.zeros(3), "cu_seqlens": BOUNDS, "ratio": 0.5} | changed
    with pytest.raises(ValueError, match=message):
        select_interference_tokens(**arguments)


def test_ids_beyond_the_vocabulary_are_refused_on_request(monkeypatch):
    """Off by default because reading ids back makes the host wait; the token then has probability 0."""
    beyond = torch.tensor([0, 5, 2])
    assert token_logprobs(LOGITS, beyond)[1] == -torch.inf
    monkeypatch.setenv("LENS_KERNELS_CHECK_IDS", "1")
    with pytest.raises(ValueError, match="token_ids: got id 5, need ids below 5"):
        token_logprobs(LOGITS, beyond)
    with pytest.raises(ValueError, match="token_ids: got id 2, need ids below 2"):
        linear_token_logprobs(HIDDEN, WEIGHT, IDS, valid_vocab_size=2)
    token_logprobs(LOGITS, IDS)

"""Makes the tensors that all peers of an operator get: equal values in RL trainers' layout (batch of sequences)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.operators.shapes import Shape

KL_WEIGHT = 0.04
REFERENCE_DISTANCE = 0.3
"""Standard deviation, in nats, of the difference between the policy's and the reference's log-probabilities."""
LOGIT_SCALE = 3
UPCAST_ELEMENTS = 1 << 26  # float32 logits held at a time while the inputs are made: 256 MiB


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitsInputs:
    """Inputs of B sequences of S rows. The last row of each has no next token, so every peer leaves it out."""

    logits: Tensor
    """[B, S, V] float32 or bfloat16."""
    reference_logits: Tensor | None
    """[B, S, V]; only for interference_scores."""
    ids: Tensor
    """[B, S] int64, -1 in the last column."""
    targets: Tensor
    """[B, S - 1] int64, `ids` without its last column."""
    reference_logprobs: Tensor
    """[B, S] float32."""
    target_reference_logprobs: Tensor
    """[B, S - 1], `reference_logprobs` without its last column."""
    advantages: Tensor
    """[B] float32, one per sequence: the most that Liger and fla can take."""
    weights: Tensor
    """[B, S - 1] float32, the loss's gradient by each log-probability: 0.5 to 1.5. With both signs most of the weighted
    sum would cancel and the errors of rounded log-probabilities would not, so that it could not be checked."""

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return (self.logits,)


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearInputs:
    hidden: Tensor
    """[B, S, H] float32 or bfloat16."""
    weight: Tensor
    """[V, H] like hidden."""
    ids: Tensor
    """[B, S] int64."""
    reference_logprobs: Tensor
    """[B, S] float32."""
    advantages: Tensor
    """[B] float32."""

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return self.hidden, self.weight


Inputs = LogitsInputs | LinearInputs


def make_logits(shape: Shape, dtype: torch.dtype, device: torch.device, backward: bool, pair: bool) -> LogitsInputs:
    sequences, rows = shape.rows // shape.sequence, shape.sequence
    draw = torch.Generator(device).manual_seed(0)
    normal = {"generator": draw, "device": device}
    logits = torch.randn(sequences, rows, shape.vocab, dtype=dtype, **normal).mul_(LOGIT_SCALE)
    reference = None
    if pair:
        reference = torch.randn(logits.shape, dtype=dtype, **normal).mul_(0.03).add_(logits)
    targets = torch.randint(shape.vocab, (sequences, rows - 1), **normal)
    ids = torch.nn.functional.pad(targets, (0, 1), value=-1)
    flat = logits.view(-1, shape.vocab)
    reference_logprobs = _near(lambda part: flat[part].float(), ids, shape.vocab, normal)
    return LogitsInputs(
        logits=logits.requires_grad_(backward),
        reference_logits=reference,
        ids=ids,
        targets=targets,
        reference_logprobs=reference_logprobs,
        target_reference_logprobs=reference_logprobs[:, :-1].contiguous(),
        advantages=torch.randn(sequences, **normal),
        weights=torch.rand(targets.shape, **normal).add_(0.5),
    )


def make_linear(shape: Shape, dtype: torch.dtype, device: torch.device, backward: bool) -> LinearInputs:
    sequences, rows = shape.rows // shape.sequence, shape.sequence
    draw = torch.Generator(device).manual_seed(0)
    normal = {"generator": draw, "device": device}
    hidden = torch.randn(sequences, rows, shape.hidden, dtype=dtype, **normal)
    weight = torch.randn(shape.vocab, shape.hidden, dtype=dtype, **normal).mul_(LOGIT_SCALE / shape.hidden**0.5)
    ids = torch.randint(shape.vocab, (sequences, rows), **normal)
    flat = hidden.view(-1, shape.hidden)
    reference_logprobs = _near(lambda part: (flat[part] @ weight.T).float(), ids, shape.vocab, normal)
    return LinearInputs(
        hidden=hidden.requires_grad_(backward),
        weight=weight.requires_grad_(backward),
        ids=ids,
        reference_logprobs=reference_logprobs,
        advantages=torch.randn(sequences, **normal),
    )


def _near(logits_of: Callable[[slice], Tensor], ids: Tensor, vocab: int, normal: dict) -> Tensor:
    """Reference log-probabilities [B, S] close to the policy's, as in training; `logits_of` rows gives [n, V]."""
    flat, step = ids.view(-1).clamp(min=0), max(1, UPCAST_ELEMENTS // vocab)
    logprobs = torch.empty(len(flat), device=flat.device)
    for start in range(0, len(flat), step):
        part = slice(start, start + step)
        logits = logits_of(part)
        logprobs[part] = logits.gather(1, flat[part, None])[:, 0] - logits.logsumexp(1)
    return logprobs.view(ids.shape) + REFERENCE_DISTANCE * torch.randn(ids.shape, **normal)


def with_working_copy(inputs: LogitsInputs) -> LogitsInputs:
    """Returns the same inputs on a second copy of the logits, for peers that overwrite them."""
    copy = inputs.logits.detach().clone()
    return replace(inputs, logits=copy.requires_grad_(inputs.logits.requires_grad))


def refresh(working: LogitsInputs, pristine: LogitsInputs) -> None:
    with torch.no_grad():
        working.logits.copy_(pristine.logits)

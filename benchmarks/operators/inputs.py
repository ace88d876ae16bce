"""The tensors that all peers of an operator get: the same values, in the layout of RL trainers (batch of sequences)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.operators.shapes import Shape

KL_WEIGHT = 0.04
SELECTED_RATIO = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitsInputs:
    """B sequences of S rows. The last row of each has no next token: every peer leaves it out."""

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
    """[B, S - 1] float32, the loss's gradient by each log-probability."""

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


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectionInputs:
    scores: Tensor
    """[T] float32, without ties."""
    cu_seqlens: Tensor
    """[P + 1] int32."""


Inputs = LogitsInputs | LinearInputs | SelectionInputs


def make_logits(shape: Shape, dtype: torch.dtype, device: torch.device, backward: bool, pair: bool) -> LogitsInputs:
    sequences, rows = shape.rows // shape.sequence, shape.sequence
    draw = torch.Generator(device).manual_seed(0)
    normal = {"generator": draw, "device": device}
    logits = torch.randn(sequences, rows, shape.vocab, dtype=dtype, **normal).mul_(3)
    reference = None
    if pair:
        reference = torch.randn(logits.shape, dtype=dtype, **normal).mul_(0.03).add_(logits)
    targets = torch.randint(shape.vocab, (sequences, rows - 1), **normal)
    reference_logprobs = torch.randn(sequences, rows, **normal) - 15
    return LogitsInputs(
        logits=logits.requires_grad_(backward),
        reference_logits=reference,
        ids=torch.nn.functional.pad(targets, (0, 1), value=-1),
        targets=targets,
        reference_logprobs=reference_logprobs,
        target_reference_logprobs=reference_logprobs[:, :-1].contiguous(),
        advantages=torch.randn(sequences, **normal),
        weights=torch.randn(targets.shape, **normal),
    )


def make_linear(shape: Shape, dtype: torch.dtype, device: torch.device, backward: bool) -> LinearInputs:
    sequences, rows = shape.rows // shape.sequence, shape.sequence
    draw = torch.Generator(device).manual_seed(0)
    normal = {"generator": draw, "device": device}
    scale = 3 / shape.hidden**0.5  # logits with standard deviation 3
    hidden = torch.randn(sequences, rows, shape.hidden, dtype=dtype, **normal)
    weight = torch.randn(shape.vocab, shape.hidden, dtype=dtype, **normal).mul_(scale)
    return LinearInputs(
        hidden=hidden.requires_grad_(backward),
        weight=weight.requires_grad_(backward),
        ids=torch.randint(shape.vocab, (sequences, rows), **normal),
        reference_logprobs=torch.randn(sequences, rows, **normal) - 15,
        advantages=torch.randn(sequences, **normal),
    )


def make_selection(shape: Shape, device: torch.device) -> SelectionInputs:
    draw = torch.Generator(device).manual_seed(0)
    scores = torch.randperm(shape.rows, generator=draw, device=device).float()
    cu_seqlens = torch.arange(0, shape.rows + 1, shape.sequence, dtype=torch.int32, device=device)
    return SelectionInputs(scores=scores, cu_seqlens=cu_seqlens)


def with_working_copy(inputs: LogitsInputs) -> LogitsInputs:
    """The same inputs on a second copy of the logits, for peers that overwrite them."""
    copy = inputs.logits.detach().clone()
    return replace(inputs, logits=copy.requires_grad_(inputs.logits.requires_grad))


def refresh(working: LogitsInputs, pristine: LogitsInputs) -> None:
    with torch.no_grad():
        working.logits.copy_(pristine.logits)

"""Describes a pass through the LM head: which rows take part, in which chunks, and how they are multiplied.

`check_head` turns the arguments of the linear functions into a `HeadPlan`, a record of numbers and of tensors of T
entries. `Operands` joins it to the hidden states and the weight, which autograd must see as arguments of their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from lens_kernels._checks import (
    check_chunk_rows,
    check_device,
    check_matrix,
    check_rows,
    check_softcap,
    check_temperature,
    check_tensor,
    check_token_ids,
    check_valid_vocab_size,
    require,
)
from lens_kernels._products import Parts, Precision, multiplies_as_is, resolve_precision, split
from lens_kernels._vocab_parallel import TokenRows, gather_rows, resolve_shard
from lens_kernels.shard import VocabShard

# Each chunk reads the weight and updates its gradient, of twice the width; more rows per chunk hide this better.
CHUNK_ROWS = 4096
CHUNK_ROWS_CPU = 256
TILED_DEVICES = ("cuda",)
"""Devices on which half-precision heads take tiles of the vocabulary. That tiles are faster there is a prediction from
the bytes that they move (two per logit that no product hides, in place of ten): no GPU has chosen yet."""

Path = Literal["chunks", "tiles"]
PathName = Literal["auto", "chunks", "tiles"]
_PATHS = get_args(PathName)  # here, because torch.compile cannot look into typing


class HeadPlan(NamedTuple):
    """How T rows go through the LM head."""

    tokens: TokenRows
    rows: Tensor | None  # [T] indices into the N rows of the hidden states; None: all, T = N
    chunk_rows: int
    boundaries: tuple[int, ...] | None  # the T rows at which a chunk may end; None: any
    sequence_parallel: bool  # `hidden` was cut along its first axis: gathered forward, its gradient reduce-scattered
    precision: Precision
    path: Path


class Operands(NamedTuple):
    """The LM head's operands as they are multiplied."""

    hidden: Tensor  # [N, H], of all ranks under sequence parallelism, in its own dtype
    weight: Parts  # of [V, H]
    bias: Tensor | None  # [V]

    @property
    def columns(self) -> int:
        """V, the number of columns of the vocabulary on this rank."""
        return len(self.weight[0])


class Chunk(NamedTuple):
    """Some of the T rows, and what they are multiplied by."""

    part: slice  # of the T rows
    tokens: TokenRows
    hidden: Tensor  # [n, H], 0 on ignored rows
    factors: Parts  # of `hidden`


def default_path(device: torch.device, precision: Precision) -> Path:
    """Returns the path that is expected to be the faster one. See TILED_DEVICES."""
    return "tiles" if device.type in TILED_DEVICES and precision.is_half else "chunks"


def join_operands(hidden: Tensor, weight: Tensor, bias: Tensor | None, plan: HeadPlan) -> Operands:
    """Gathers the hidden states where they were cut, and turns the weight to the dtype of its products."""
    if plan.sequence_parallel:
        hidden = gather_rows(hidden, plan.tokens.shard)
    return Operands(hidden.reshape(-1, hidden.shape[-1]), split(weight, plan.precision), bias)


def chunk_slices(count: int, chunk_rows: int, boundaries: Sequence[int] | None) -> list[slice]:
    """Cuts `count` rows into slices of at most `chunk_rows`, or at the last boundary that they reach.

    Example: boundaries (3, 5, 20, 22) and 6 rows per chunk give 0:5, 5:20 and 20:22.
    """
    slices, start = [], 0
    while start < count:
        stop = min(start + chunk_rows, count)
        if boundaries is not None:
            within = [end for end in boundaries if start < end <= stop]
            stop = within[-1] if within else min(end for end in boundaries if end > start)
        slices.append(slice(start, stop))
        start = stop
    return slices


def head_chunks(plan: HeadPlan, operands: Operands) -> Iterator[Chunk]:
    """Yields the chunks of the T rows in order."""
    token_ids = plan.tokens.token_ids
    for part in chunk_slices(len(token_ids), plan.chunk_rows, plan.boundaries):
        hidden = operands.hidden[part] if plan.rows is None else operands.hidden[plan.rows[part]]
        # Ignored rows may hold any values, also NaN: 0 * NaN would reach the weight's gradient.
        hidden = hidden.masked_fill((token_ids[part] < 0)[:, None], 0)
        yield Chunk(part, plan.tokens.at(part), hidden, split(hidden, plan.precision))


def largest_chunk(plan: HeadPlan) -> int:
    """Returns the number of rows of the longest chunk, 0 if there is none."""
    slices = chunk_slices(len(plan.tokens.token_ids), plan.chunk_rows, plan.boundaries)
    return max((part.stop - part.start for part in slices), default=0)


def gradient_dtype(plan: HeadPlan, device: torch.device) -> torch.dtype:
    """Returns the dtype of the logits' gradient.

    Half-precision heads round it to bfloat16, as every half-precision backward does; float16 would lose its small
    values, which no loss scale has raised here. In chunks off the GPU it stays exact, because its products are.
    """
    rounds = plan.precision.is_half and (plan.path == "tiles" or multiplies_as_is(device))
    return torch.bfloat16 if rounds else torch.float32


def check_head(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    bias: Tensor | None,
    rows: Tensor | None,
    temperature: Tensor | float,
    logit_softcap: float | None,
    valid_vocab_size: int | None,
    shard: VocabShard | None,
    chunk_rows: int | None,
    sequence_parallel: bool,
    precision: str,
    path: str,
    boundaries: Sequence[int] | None = None,
) -> HeadPlan:
    """Checks the arguments that the two linear functions share. Raises ValueError."""
    _check_operands(hidden, weight, bias)
    leading = hidden.shape[:-1]
    if sequence_parallel:
        if shard is None or shard.group is None:
            raise ValueError("sequence_parallel: got True, need a shard with a group to gather the hidden states over")
        require(len(leading) >= 1, "hidden", lambda: f"shape {tuple(hidden.shape)}", "a sequence axis before H")
        leading = torch.Size([leading[0] * dist.get_world_size(shard.group), *leading[1:]])
    check_rows(rows, leading.numel(), hidden.device)
    shape = leading if rows is None else rows.shape
    ids = check_token_ids(token_ids, shape, hidden.device)
    tau = check_temperature(temperature, shape, hidden.device)
    check_softcap(logit_softcap)
    softcap = None if logit_softcap is None else float(logit_softcap)
    check_valid_vocab_size(valid_vocab_size)
    check_chunk_rows(chunk_rows)
    if chunk_rows is None:
        chunk_rows = CHUNK_ROWS_CPU if hidden.device.type == "cpu" else CHUNK_ROWS
    require(path in _PATHS, "path", repr(path), f"one of {', '.join(_PATHS)}")
    factors = resolve_precision(precision, hidden, weight)
    return HeadPlan(
        TokenRows(ids, tau, softcap, resolve_shard(len(weight), ids, valid_vocab_size, shard)),
        rows,
        chunk_rows,
        _check_boundaries(boundaries, shape),
        sequence_parallel,
        factors,
        default_path(hidden.device, factors) if path == "auto" else path,  # type: ignore[arg-type]  # checked above
    )


def _check_operands(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    for name, value in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        _refuse_foreign(name, value)
    check_matrix("hidden", hidden, "H")
    check_matrix("weight", weight, "H")
    width = hidden.shape[-1]
    fits = weight.dim() == 2 and weight.shape[1] == width and len(weight) >= 1
    require(
        fits,
        "weight",
        lambda: f"shape {tuple(weight.shape)}",
        lambda: f"[V, {width}] to match hidden {tuple(hidden.shape)}",
    )
    check_device("weight", weight, hidden.device)
    if bias is not None:
        check_tensor("bias", bias)
        require(bias.shape == weight.shape[:1], "bias", f"shape {tuple(bias.shape)}", f"[{len(weight)}]")
        require(bias.is_floating_point(), "bias", str(bias.dtype), "a floating-point dtype")
        check_device("bias", bias, hidden.device)


def _refuse_foreign(argument: str, value: object) -> None:
    """Refuses tensors that other frameworks hold in pieces or in a format of their own, and names the remedy."""
    if not isinstance(value, Tensor):
        return
    if hasattr(value, "placements"):
        need = (
            "a plain tensor: call inside the forward of the module for which FSDP2 gathers it, or pass "
            f"{argument}.full_tensor(grad_placements=[Partial()]), or {argument}.to_local() with a VocabShard where it "
            "is cut along the vocabulary"
        )
        require(False, argument, "a DTensor", need)
    if hasattr(value, "ds_id") and value.numel() == 0:
        got = f"a parameter of shape {tuple(getattr(value, 'ds_shape', ()))} that ZeRO-3 has cut into pieces"
        need = f"all of its elements: call inside `with deepspeed.zero.GatheredParameters([{argument}])`"
        require(False, argument, got, need)
    if hasattr(value, "__tensor_flatten__") or value.is_quantized or value.element_size() == 1:
        need = "float32, bfloat16 or float16 values: dequantise it, or leave the head out of the quantisation"
        require(False, argument, f"a quantised {type(value).__name__} of {value.dtype}", need)


def _check_boundaries(boundaries: Sequence[int] | None, shape: torch.Size) -> tuple[int, ...] | None:
    if boundaries is None:
        return None
    ends = tuple(int(end) for end in boundaries)
    rises = all(low <= high for low, high in zip(ends, ends[1:], strict=False))
    fits = rises and (ends[-1] if ends else 0) == shape.numel() and (not ends or ends[0] >= 0)
    need = f"row numbers that never fall, the last of them the number of rows, {shape.numel()}"
    require(fits, "boundaries", list(ends), need)
    return ends

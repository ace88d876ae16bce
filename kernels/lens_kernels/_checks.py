"""Checks arguments: every failure is a ValueError that names the argument, the value given and the value needed.

Checks that read values (not only shapes) would make the host wait for an accelerator. They always run on CPU tensors,
elsewhere only with LENS_KERNELS_CHECK_IDS=1. The range of token ids is checked only with that variable, on any device.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch import Tensor

LOGIT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ID_DTYPES = (torch.int64, torch.int32)


def require(condition: bool, argument: str, got: object, need: str | Callable[[], str]) -> None:
    """Raises ValueError unless the condition holds.

    `got` and `need` may be functions that return the words. Those with numbers of rows must be: torch.compile compiles
    a graph for every number that is printed, even into words that nobody reads.
    """
    if not condition:
        words = [text() if callable(text) else text for text in (got, need)]
        raise ValueError(f"{argument}: got {words[0]}, need {words[1]}")


def shape_of(value: Tensor) -> Callable[[], str]:
    """Returns the words for a tensor's shape, to be made only for an error."""
    return lambda: f"shape {tuple(value.shape)}"


def checks_ids() -> bool:
    return os.environ.get("LENS_KERNELS_CHECK_IDS", "0") == "1"


def may_read_values(device: torch.device) -> bool:
    return (device.type == "cpu" or checks_ids()) and not torch.compiler.is_compiling()


def check_tensor(argument: str, value: object) -> None:
    require(isinstance(value, Tensor), argument, type(value).__name__, "a torch.Tensor")


def check_device(argument: str, value: Tensor, device: torch.device) -> None:
    require(value.device == device, argument, f"device {value.device}", f"device {device} like the first argument")


def check_matrix(argument: str, value: Tensor, columns: str) -> None:
    """Checks a [..., columns] tensor of logits, hidden states or weights, whose dtype must be one that we read."""
    check_tensor(argument, value)
    require(value.dim() >= 1, argument, "a scalar", f"shape [..., {columns}]")
    require(value.shape[-1] >= 1, argument, shape_of(value), f"at least one column ({columns} >= 1)")
    require(value.dtype in LOGIT_DTYPES, argument, str(value.dtype), "float32, bfloat16 or float16")


def check_token_ids(token_ids: Tensor, shape: torch.Size, device: torch.device) -> Tensor:
    """Returns the ids as a flat, contiguous int64 [T]; `shape` is the rows' leading shape."""
    check_tensor("token_ids", token_ids)
    require(token_ids.dtype in ID_DTYPES, "token_ids", str(token_ids.dtype), "int64 or int32")
    same = token_ids.shape == shape
    require(same, "token_ids", shape_of(token_ids), lambda: f"one id per row, {tuple(shape)}")
    check_device("token_ids", token_ids, device)
    return token_ids.reshape(-1).long().contiguous()


def per_row(argument: str, value: Tensor | float, shape: torch.Size, device: torch.device) -> Tensor:
    """Broadcasts a number or tensor to the rows: float32 [T], contiguous, detached."""
    if isinstance(value, (int, float)):
        # full() fills on the device; as_tensor() would copy from the host, which a CUDA graph cannot capture.
        return torch.full((shape.numel(),), float(value), dtype=torch.float32, device=device)
    require(isinstance(value, Tensor), argument, type(value).__name__, "a torch.Tensor or a number")
    require(value.is_floating_point(), argument, str(value.dtype), "a floating-point dtype")
    check_device(argument, value, device)
    fits = value.dim() <= len(shape) and all(
        have in (1, want) for have, want in zip(reversed(value.shape), reversed(shape), strict=False)
    )
    require(fits, argument, shape_of(value), lambda: f"a shape that broadcasts to the rows {tuple(shape)}")
    return value.detach().broadcast_to(shape).reshape(-1).float().contiguous()


def number_or_per_row(argument: str, value: Tensor | float, shape: torch.Size, device: torch.device) -> Tensor | float:
    """Returns a number as a float, and a tensor as float32 [T], detached; one element gets stride 0.

    A kernel takes numbers as arguments, where filling a tensor would be a launch. torch.compile may make a symbol of a
    number, which kernels do not take, and fuses the filling.
    """
    if isinstance(value, (int, float)) and not torch.compiler.is_compiling():
        return float(value)
    if isinstance(value, Tensor) and value.numel() == 1 and value.dim() <= len(shape):
        one = per_row(argument, value, torch.Size([1] * len(shape)), device)
        return one.expand(shape.numel())
    return per_row(argument, value, shape, device)


def number_or_per_row_or_none(
    argument: str, value: Tensor | float | None, shape: torch.Size, device: torch.device
) -> Tensor | float | None:
    """Does as `number_or_per_row`; None stays None."""
    return None if value is None else number_or_per_row(argument, value, shape, device)


def check_temperature(temperature: Tensor | float, shape: torch.Size, device: torch.device) -> Tensor | None:
    """Returns the temperature per row as float32 [T], or None for exactly 1."""
    if isinstance(temperature, (int, float)):
        require(0 < temperature < float("inf"), "temperature", temperature, "a finite number > 0")
        if temperature == 1:
            return None
    require(temperature is not None, "temperature", None, "a number > 0 or a tensor of them")
    tau = per_row("temperature", temperature, shape, device)
    if isinstance(temperature, Tensor) and may_read_values(device):
        require(bool((tau > 0).all()), "temperature", "a tensor with values <= 0 or NaN", "values > 0")
    return tau


def check_softcap(logit_softcap: float | None) -> None:
    if logit_softcap is not None:
        is_number = isinstance(logit_softcap, (int, float)) and 0 < logit_softcap < float("inf")
        require(is_number, "logit_softcap", logit_softcap, "a finite number > 0, or None for logits as they are")


def check_valid_vocab_size(valid_vocab_size: int | None) -> None:
    if valid_vocab_size is not None:
        is_count = isinstance(valid_vocab_size, int) and valid_vocab_size >= 1
        require(is_count, "valid_vocab_size", valid_vocab_size, "an integer >= 1 (global vocabulary without padding)")


def check_limits(
    clip_low: float, clip_high: float, dual_clip: float | None, kl_limit: float | None, kl_estimator: str
) -> None:
    known = kl_estimator in ("k1", "k2", "k3")
    require(known, "kl_estimator", repr(kl_estimator), "'k1', 'k2' or 'k3'; lens_kernels.kl says what they are")
    require(clip_low >= 0, "clip_low", clip_low, "a number >= 0")
    require(clip_high >= 0, "clip_high", clip_high, "a number >= 0")
    if dual_clip is not None:
        require(dual_clip > 1, "dual_clip", dual_clip, "a number > 1, or None")
    if kl_limit is not None:
        require(kl_limit > 0, "kl_limit", kl_limit, "a number > 0, or None for no limit")


def check_chunk_rows(chunk_rows: int | None) -> None:
    if chunk_rows is not None:
        is_count = isinstance(chunk_rows, int) and chunk_rows >= 1
        require(is_count, "chunk_rows", chunk_rows, "an integer >= 1, or None")


def check_rows(rows: Tensor | None, count: int, device: torch.device) -> None:
    """Checks that `rows` are int64 indices into `count` flattened rows."""
    if rows is None:
        return
    check_tensor("rows", rows)
    require(rows.dim() == 1, "rows", shape_of(rows), "one dimension")
    require(rows.dtype == torch.int64, "rows", str(rows.dtype), "int64 indices")
    check_device("rows", rows, device)
    if rows.numel() and may_read_values(device):
        low, high = int(rows.min()), int(rows.max())
        require(low >= 0 and high < count, "rows", f"indices {low} to {high}", f"indices within 0 to {count - 1}")

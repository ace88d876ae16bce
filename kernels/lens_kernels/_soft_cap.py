"""Caps logits at +-c as Gemma 2 does: a logit z becomes c * tanh(z / c), whose slope is cosh(z / c)**-2.

Every slope is computed from the logit before the cap. From the capped one, 1 - (capped / c)**2 cancels near the cap: at
z = 8 c the slope is 4.5e-7, of which float32's rounding of the capped logit leaves one digit, and bfloat16's none.

The references come first, then the same functions for kernels.
"""

from __future__ import annotations

from typing import no_type_check

import torch
from torch import Tensor

from lens_kernels._backend import jit, tl


def capped(z: Tensor, softcap: float | None) -> Tensor:
    """Returns softcap * tanh(z / softcap) of float32 logits of any shape, or z where there is no cap."""
    return z if softcap is None else torch.tanh(z / softcap) * softcap


def slope_of_cap(z: Tensor, softcap: float) -> Tensor:
    """Returns the derivative of `capped` by z, of float32 logits z before the cap."""
    return torch.cosh(z / softcap).pow_(-2)


@jit
@no_type_check
def soft_cap(z, SOFTCAP: tl.constexpr):
    """Returns SOFTCAP * tanh(z / SOFTCAP), or z where SOFTCAP is None."""
    if SOFTCAP is not None:
        y = z * (1.0 / SOFTCAP)
        size = tl.abs(y)
        far = 1.0 - 2.0 / (tl.exp2(size * 2.8853900817779268) + 1.0)
        square = y * y
        # The formula above cancels near 0, where Taylor's series is exact to 1e-8.
        near = 1 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835))))
        z = SOFTCAP * tl.where(size < 0.25, y * near, tl.where(y < 0, -far, far))
    return z


@jit
@no_type_check
def soft_cap_slope(z, SOFTCAP: tl.constexpr):
    """Returns the derivative of `soft_cap` by z, the logit before the cap; SOFTCAP is a number."""
    rest = 2.0 / (tl.exp2(tl.abs(z) * (2.8853900817779268 / SOFTCAP)) + 1.0)  # 1 - |tanh|, without cancellation
    return rest * (2.0 - rest)

"""What a peer is: a library's way of doing an operator's work, and whether it can run here."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass

import lens_kernels
import torch
from torch import Tensor

from benchmarks.operators.inputs import KL_WEIGHT, Inputs

torch._dynamo.config.recompile_limit = 64  # one graph per shape: none may fall back to a dynamic or an eager one


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    name: str
    forward: Callable[[Inputs], Tensor]
    """The operator's result: [..] values per row, or the scalar loss that the harness differentiates."""
    module: str = "torch"
    """What must be importable."""
    distribution: str = "torch"
    """Whose version the results name."""
    inplace: bool = False
    """Overwrites the logits: it gets fresh ones before every call, outside the timed region."""
    needs_cuda: bool = False
    note: str = ""
    """Where its work differs from the others'."""
    missing: str = ""
    """Why it cannot run at all; empty where it can."""

    def obstacle(self, device: torch.device) -> str:
        """Why it cannot run here, or an empty string."""
        if self.missing:
            return self.missing
        if importlib.util.find_spec(self.module.split(".")[0]) is None:
            return "not installed"
        if self.needs_cuda and device.type != "cuda":
            return "unsupported: needs CUDA"
        try:
            importlib.import_module(self.module)
        except Exception as error:  # a half-installed library must cost its own rows only
            return f"not importable: {type(error).__name__}: {error}"
        return ""

    def version(self) -> str | None:
        try:
            return importlib.metadata.version(self.distribution)
        except importlib.metadata.PackageNotFoundError:
            return None


def ours(function: str, call: Callable[[Callable, Inputs], Tensor], inplace: bool = False) -> list[Peer]:
    """The public function, and the plain PyTorch `<function>_reference` where lens_kernels has one."""
    public = getattr(lens_kernels, function)
    name = f"{function}_reference"
    reference = getattr(lens_kernels, name, None) or getattr(sys.modules[public.__module__], name, None)
    return [
        Peer(
            name="lens_kernels",
            forward=lambda inputs: call(public, inputs),
            module="lens_kernels",
            distribution="lens-kernels",
            inplace=inplace,
        ),
        Peer(
            name="lens_kernels reference",
            forward=lambda inputs: call(reference, inputs),
            module="lens_kernels",
            distribution="lens-kernels",
            inplace=inplace,
            missing="" if reference else f"lens_kernels has no {name}",
        ),
    ]


@functools.cache
def compiled(function: Callable) -> Callable:
    """torch.compile with one graph per shape, which is its fastest form."""
    return torch.compile(function, dynamic=False, fullgraph=True)


def loss_of_logprobs(logprobs: Tensor, reference_logprobs: Tensor, advantages: Tensor) -> Tensor:
    """The on-policy GRPO loss with k3, mean over tokens: [B, S] logprobs and references, [B] advantages.

    On-policy (ratio 1, with its gradient) is LENS's own case and the only one that all peers can do. The work is that
    of the general case: a few operations per row.
    """
    ratio = torch.exp(logprobs - logprobs.detach())
    gap = reference_logprobs - logprobs
    kl = torch.exp(gap) - gap - 1
    return (KL_WEIGHT * kl - ratio * advantages[:, None]).mean()


def truth(forward: Callable[[Inputs], Tensor], inputs: Inputs) -> tuple[Tensor, tuple[Tensor, ...]]:
    """(value, gradients) of `forward`, which must compute in float64."""
    value = forward(inputs)
    return value.detach(), torch.autograd.grad(value, inputs.leaves) if value.requires_grad else ()



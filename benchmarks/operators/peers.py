"""Describes a peer: a library's way of doing an operator's work, and whether it can run here."""

from __future__ import annotations

import functools
import importlib
import importlib.machinery
import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import lens_kernels
import torch
from torch import Tensor

from benchmarks.operators.inputs import KL_WEIGHT, Inputs

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""True if Triton's kernels run on CPU tensors: a way to check calls of peers without a GPU, never to time them."""

torch._dynamo.config.recompile_limit = 64  # one graph per shape: none may fall back to a dynamic or an eager one


OURS = "lens_kernels"
TRITON = "its kernels are Triton"


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    name: str
    forward: Callable[[Inputs], Tensor]
    """The operator's result: [..] values per row, or the scalar loss that the harness differentiates."""
    module: str = "torch"
    """The module that must be importable."""
    distribution: str = "torch"
    """The distribution whose version the results name."""
    inplace: bool = False
    """True if it overwrites the logits: it then gets fresh ones before every call, outside the timed region."""
    needs_cuda: str = ""
    """The reason why it does not run on a CPU; empty where it does."""
    note: str = ""
    """Says in what its work differs from that of the others."""
    missing: str = ""
    """The reason why it cannot run at all; empty where it can."""

    def obstacle(self, device: torch.device) -> str:
        """Returns why it cannot run here, or an empty string."""
        if self.missing:
            return self.missing
        if importlib.util.find_spec(self.module.split(".")[0]) is None:
            return f"not installed: pip install {self.distribution}"
        interpreted = INTERPRETED and self.needs_cuda == TRITON
        if self.needs_cuda and device.type != "cuda" and not interpreted:
            return f"needs CUDA: {self.needs_cuda}"
        try:
            import_alone(self.module)
        except Exception as error:  # a half-installed library must cost its own rows only
            return f"not importable: {type(error).__name__}: {error}"
        return ""

    def version(self) -> str | None:
        try:
            return importlib.metadata.version(self.distribution)
        except importlib.metadata.PackageNotFoundError:
            return None


def import_alone(name: str) -> ModuleType:
    """Imports a module even where its parents' own imports fail: verl's need Ray, its kernels do not."""
    try:
        return importlib.import_module(name)
    except ImportError:
        top, *inner = name.split(".")
        folder = Path(importlib.util.find_spec(top).submodule_search_locations[0])
        for depth in range(len(inner)):
            parent = ".".join([top, *inner[:depth]])
            bare = ModuleType(parent)
            bare.__spec__ = importlib.machinery.ModuleSpec(parent, None, is_package=True)
            bare.__path__ = bare.__spec__.submodule_search_locations = [str(folder.joinpath(*inner[:depth]))]
            sys.modules.setdefault(parent, bare)
        return importlib.import_module(name)


def ours(function: str, call: Callable[[Callable, Inputs], Tensor], inplace: bool = False) -> Peer:
    """Makes the peer of the public function; `call` hands it the inputs."""
    public = getattr(lens_kernels, function)
    return Peer(
        name=OURS,
        forward=lambda inputs: call(public, inputs),
        module="lens_kernels",
        distribution="lens-kernels",
        inplace=inplace,
    )


@functools.cache
def compiled(function: Callable) -> Callable:
    """Compiles with torch.compile, one graph per shape, which is its fastest form."""
    return torch.compile(function, dynamic=False, fullgraph=True)


def loss_of_logprobs(logprobs: Tensor, reference_logprobs: Tensor, advantages: Tensor) -> Tensor:
    """Computes the on-policy GRPO loss with k3, mean over tokens: [B, S] logprobs and references, [B] advantages.

    On-policy (ratio 1, with its gradient) is LENS's own case and the only one that all peers can do. The work is that
    of the general case: a few operations per row.
    """
    ratio = torch.exp(logprobs - logprobs.detach())
    gap = reference_logprobs - logprobs
    kl = torch.exp(gap) - gap - 1
    return (KL_WEIGHT * kl - ratio * advantages[:, None]).mean()

"""Describes a peer: a library's way of doing an operator's work, and whether it can run here."""

from __future__ import annotations

import functools
import importlib
import importlib.machinery
import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import lens_kernels
import torch
from torch import Tensor

from benchmarks.operators.inputs import KL_WEIGHT, Inputs
from benchmarks.operators.results import Status

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""True if Triton's kernels run on CPU tensors: a way to check calls of peers without a GPU, never to time them."""

torch._dynamo.config.recompile_limit = 64  # one graph per shape: none may fall back to a dynamic or an eager one


OURS = "lens_kernels"
TRITON = "its kernels are Triton"
COMPILED_TRITON = "its kernels are Triton of a form that the interpreter does not take"
CUTE = "its kernels are CuTe"


class Package(NamedTuple):
    """A package that a peer imports only when it runs."""

    module: str
    distribution: str


class Obstacle(NamedTuple):
    """Why a peer does not run: ABSENT if an installation would help, else INAPPLICABLE."""

    status: Status
    reason: str


CUTLASS = (
    Package("cutlass", "nvidia-cutlass-dsl"),
    Package("cuda", "cuda-bindings"),
    Package("tvm_ffi", "apache-tvm-ffi"),
)
"""What kernels in CuTe need beside the package that holds them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    name: str
    forward: Callable[[Inputs], Tensor]
    """The operator's result: [..] values per row, or the scalar loss that the harness differentiates."""
    module: str = "torch"
    """The module that must be importable."""
    distribution: str = "torch"
    """The distribution whose version the results name."""
    extras: tuple[Package, ...] = ()
    """What else must be installed."""
    rounds_rows: bool = False
    """True if it rounds each row's value to the logits' dtype before the loss adds them up."""
    inplace: bool = False
    """True if it overwrites the logits: it then gets fresh ones before every call, outside the timed region."""
    needs_cuda: str = ""
    """The reason why it does not run on a CPU; empty where it does."""
    majors: tuple[int, ...] = ()
    """The major compute capabilities that its kernels are for; empty where they are for all."""
    dtypes: tuple[torch.dtype, ...] = ()
    """The dtypes of logits that it takes and returns gradients in; empty where it takes all."""
    vocab_multiple: int = 1
    """What V must be a multiple of."""
    session: Callable[[torch.device], AbstractContextManager] = nullcontext
    """Surrounds all its calls in a case: `one_rank_group` for one that needs a process group."""
    note: str = ""
    """Says in what its work differs from that of the others."""
    unsupported: str = ""
    """The reason why it does not do this work; empty where it does."""
    too_old: str = ""
    """The reason why its installed version does not have it; empty where it does."""

    def obstacle(self, device: torch.device, dtype: torch.dtype, vocab: int) -> Obstacle | None:
        """Returns why it cannot do a case, or None. What the case rules out is named before what is not installed.

        Args:
            device: of all tensors.
            dtype: of logits, or of hidden states and weight.
            vocab: V, the columns of the logits.
        """
        unsuited = self._unsuited(device, dtype, vocab)
        if unsuited:
            return Obstacle(Status.INAPPLICABLE, unsuited)
        if self.too_old:
            return Obstacle(Status.ABSENT, self.too_old)
        for package in (Package(self.module, self.distribution), *self.extras):
            if importlib.util.find_spec(package.module.split(".")[0]) is None:
                return Obstacle(Status.ABSENT, f"not installed: pip install {package.distribution}")
        try:
            import_alone(self.module)
        except Exception as error:  # a half-installed library must cost its own rows only
            return Obstacle(Status.ABSENT, f"not importable: {type(error).__name__}: {error}")
        return None

    def _unsuited(self, device: torch.device, dtype: torch.dtype, vocab: int) -> str:
        if self.unsupported:
            return self.unsupported
        if vocab % self.vocab_multiple:
            return f"V must be a multiple of {self.vocab_multiple}, and this case has {vocab}"
        if self.dtypes and dtype not in self.dtypes:
            return f"takes {', '.join(map(str, self.dtypes))} only, and this case has {dtype}"
        if device.type != "cuda":
            interpreted = INTERPRETED and self.needs_cuda == TRITON
            return f"needs CUDA: {self.needs_cuda}" if self.needs_cuda and not interpreted else ""
        capability = torch.cuda.get_device_capability(device)
        if self.majors and capability[0] not in self.majors:
            listed = ", ".join(f"{major}.x" for major in self.majors)
            return f"its kernels are for compute capability {listed}; this device has {'.'.join(map(str, capability))}"
        return ""

    def version(self) -> str | None:
        try:
            return importlib.metadata.version(self.distribution)
        except importlib.metadata.PackageNotFoundError:
            return None


@contextmanager
def one_rank_group(device: torch.device) -> Iterator[None]:
    """Makes torch.distributed's default group one of this process alone, for peers that divide the vocabulary.

    Raises RuntimeError if there is a default group of several ranks: such a peer would then measure something else.
    """
    if torch.distributed.is_initialized():
        ranks = torch.distributed.get_world_size()
        if ranks != 1:
            raise RuntimeError(f"the default process group has {ranks} ranks and must have 1: run one process")
        yield
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


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

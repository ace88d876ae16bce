"""Locks the state of the last finished step, which another thread can copy while the main one goes on.

Between two optimizer steps nothing changes weights or optimizer state, but two things move them: the optimizer's step
itself, and the way to host memory and back. They hold the lock. The reference policy's weights come in other storages,
so what is recorded here stays what it was.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lens_megatron.policy.shards import Piece


@dataclass(frozen=True, slots=True)
class FinishedStep:
    """Holds all that a checkpoint after `step` needs of this rank."""

    step: int
    version: int
    scheduler_steps: int
    optimizer_steps: int
    metric: float | None
    pieces: tuple[tuple[Piece, Tensor], ...]
    """Views of the live storages, or copies of them."""
    generators: dict[str, Tensor]
    selection: dict[str, Any] | None
    epoch: float | None


class StateGuard:
    """`finished` is None while weights and optimizer belong to no finished step. It must be read with the lock held."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.finished: FinishedStep | None = None
        self._copied = False

    def finish(self, step: FinishedStep) -> None:
        """Takes note that weights and optimizer are those of `step` from now on."""
        with self.lock:
            self.finished, self._copied = step, False

    def keep_copy(self) -> None:
        """Copies the finished step's state to host memory, for a step of several updates that will change it."""
        with self.lock:
            if self.finished is not None and not self._copied:
                copies = tuple((piece, tensor.to("cpu", copy=True)) for piece, tensor in self.finished.pieces)
                self.finished, self._copied = replace(self.finished, pieces=copies), True

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Within the block weights and optimizer may change, and no other thread reads them."""
        with self.lock:
            if not self._copied:
                self.finished = None
            yield
            if torch.cuda.is_available():
                torch.cuda.synchronize()  # a copy on another stream must find it done

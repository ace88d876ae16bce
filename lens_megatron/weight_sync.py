"""Policy weights -> rollout engine: one stream of (Hugging Face name, tensor), versioned, checked by the engine."""

import time
from collections.abc import Iterable, Iterator

from torch import Tensor

from lens_megatron.rollout.engine import RolloutEngine
from lens_megatron.types import SyncStats


class WeightSyncError(RuntimeError):
    """The engine does not hold the trainer's weights, or ranks hold different ones; the message says how it shows."""


def push(
    weights: Iterable[tuple[str, Tensor]], engine: RolloutEngine, version: int, received_bytes: int = 0
) -> SyncStats:
    """Loads `weights`, of which other ranks send `received_bytes`, into `engine`.

    Raises WeightManifestError unless every name comes exactly once.
    """
    tensors = size = 0

    def counted() -> Iterator[tuple[str, Tensor]]:
        nonlocal tensors, size
        for name, tensor in weights:
            tensors += 1
            size += tensor.numel() * tensor.element_size()
            yield name, tensor

    start = time.perf_counter()
    engine.load_weights(counted(), version)
    return SyncStats(tensors, size, time.perf_counter() - start, received_bytes)

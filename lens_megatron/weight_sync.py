"""Policy weights -> rollout engine: one stream of (Hugging Face name, tensor), versioned, checked by the engine."""

import time
from collections.abc import Iterable, Iterator

from torch import Tensor

from lens_megatron.policy.hf_weights import export_weights
from lens_megatron.policy.model import Policy
from lens_megatron.rollout.engine import RolloutEngine
from lens_megatron.types import SyncStats


class EngineWeights:
    """Keeps an engine's weights those of the policy."""

    def __init__(self, policy: Policy, engine: RolloutEngine):
        self.policy, self.engine = policy, engine
        self.last = SyncStats(0, 0, 0.0)
        """Of the last transfer."""

    def renew(self) -> None:
        """Sends the policy's weights, unless the engine has them. A collective; no request may be in flight.

        Raises WeightManifestError unless every name comes exactly once.
        """
        if self.engine.version != self.policy.version:
            weights = export_weights(self.policy.bridge, self.policy.chunks)
            self.last = push(weights, self.engine, self.policy.version)


def push(weights: Iterable[tuple[str, Tensor]], engine: RolloutEngine, version: int) -> SyncStats:
    """Loads `weights` into `engine`. Raises WeightManifestError unless every name comes exactly once."""
    tensors = size = 0

    def counted() -> Iterator[tuple[str, Tensor]]:
        nonlocal tensors, size
        for name, tensor in weights:
            tensors += 1
            size += tensor.numel() * tensor.element_size()
            yield name, tensor

    start = time.perf_counter()
    engine.load_weights(counted(), version)
    return SyncStats(tensors, size, time.perf_counter() - start)

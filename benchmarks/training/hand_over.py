"""Measures how long the trainer's state takes to host memory and back, as when an engine needs the device."""

import time
from collections.abc import Iterator

import torch
from torch import Tensor

from lens_megatron.policy.model import Policy
from lens_megatron.policy.offload import TrainerMemory
from lens_megatron.policy.sharded_state import optimizers


def hand_over(policy: Policy, rounds: int) -> dict:
    """Moves the state away and back `rounds` times. The first time also allocates the pinned memory.

    Returns the seconds of every round, the bytes that moved, the device's memory that stayed taken, and whether the sum
    of the bytes of every tensor was the same before and after.
    """
    device = policy.mesh.device
    memory = TrainerMemory(policy, enabled=True)
    before = _sums(policy)
    found: dict = {"to_host_s": [], "to_device_s": [], "bytes": 0, "device_bytes_while_away": 0}
    for _ in range(rounds):
        start = time.perf_counter()
        found["bytes"] = memory.to_host()
        middle = time.perf_counter()
        if device.type == "cuda":
            found["device_bytes_while_away"] = torch.cuda.memory_allocated()
        back = time.perf_counter()
        memory.to_device()
        found["to_host_s"].append(middle - start)
        found["to_device_s"].append(time.perf_counter() - back)
    return found | {"unchanged": _sums(policy) == before}


def _sums(policy: Policy) -> list[int]:
    """Returns the sum of the bytes of each tensor of the state, since a second copy would not fit beside the first."""
    return [int(_as_bytes(tensor).sum(dtype=torch.int64)) for tensor in _state(policy)]


def _as_bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def _state(policy: Policy) -> Iterator[Tensor]:
    for model in policy.models():
        yield from (parameter.data for parameter in model.parameters())
    for optimizer in optimizers(policy):
        for group in optimizer.optimizer.param_groups:
            yield from (parameter.data for parameter in group["params"])
        for state in optimizer.optimizer.state.values():
            yield from (value for value in state.values() if isinstance(value, Tensor) and value.dim())

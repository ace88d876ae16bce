"""Moves the trainer's weights, gradients and optimizer state to host memory while an engine uses the device, and back.

Storages move, not tensors. One is emptied in place and filled again, so that all its views (parameters in Megatron's
flat buffers, `main_grad`, the distributed optimizer's shards) are afterwards what they were. Gradients are not copied:
they belong to an update that is done, and the next one begins by clearing them.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, UntypedStorage

from lens_megatron.config import Config
from lens_megatron.policy.model import Policy
from lens_megatron.policy.sharded_state import optimizers


class TrainerMemory:
    """Moves one rank's part of the policy. Not a collective. The policy cannot be used while it is away.

    Args:
        enabled: with False nothing ever moves.
    """

    def __init__(self, policy: Policy, *, enabled: bool):
        self.policy, self.enabled = policy, enabled
        self._host: dict[int, Tensor] = {}
        """Copies by storage, kept from one time to the next: pinning memory is slow."""
        self._away: list[tuple[UntypedStorage, int]] = []
        """Emptied storages and the bytes they had."""

    @property
    def is_away(self) -> bool:
        return bool(self._away)

    def to_host(self) -> int:
        """Moves the policy off the device; returns the bytes that this has freed there, 0 if it is away already."""
        if not self.enabled or self._away:
            return 0
        with self.policy.guard.lock:
            return self._to_host()

    def _to_host(self) -> int:
        device = self.policy.mesh.device
        gradients = _storages(_gradients(self.policy), device)
        state = {key: s for key, s in _storages(_state(self.policy), device).items() if key not in gradients}
        self._host = {key: self._copy(key, storage) for key, storage in state.items()}
        _finish_copies(device)
        for storage in (*state.values(), *gradients.values()):
            self._away.append((storage, storage.nbytes()))
            storage.resize_(0)
        if device.type == "cuda":
            torch.cuda.empty_cache()  # else torch would keep the memory that the engine needs
        return sum(size for _, size in self._away)

    def _copy(self, key: int, storage: UntypedStorage) -> Tensor:
        """Copies all bytes into the memory that held them the last time; the copy is done once the device is."""
        host = self._host.get(key)
        if host is None or host.numel() != storage.nbytes():
            host = torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=storage.device.type == "cuda")
        return host.copy_(_bytes(storage), non_blocking=True)

    def to_device(self) -> None:
        """Brings everything back, bit for bit, but gradients as zeros. Does nothing when nothing is away."""
        with self.policy.guard.lock:
            self._to_device()

    def read(self, tensor: Tensor) -> Tensor:
        """Returns a copy in host memory of a 1-D part of the policy, wherever that is. The caller holds the guard."""
        storage = tensor.untyped_storage()
        host = self._host.get(storage._cdata) if storage.nbytes() == 0 else None
        if host is None:
            return tensor.to("cpu", copy=True)
        first = tensor.storage_offset() * tensor.element_size()
        return host[first : first + tensor.numel() * tensor.element_size()].view(tensor.dtype).clone()

    def _to_device(self) -> None:
        for storage, size in self._away:
            storage.resize_(size)
            host = self._host.get(storage._cdata)
            if host is None:
                _bytes(storage).zero_()
            else:
                _bytes(storage).copy_(host, non_blocking=True)
        if self._away:
            _finish_copies(self.policy.mesh.device)
        self._away = []


def is_enabled(config: Config, device: torch.device) -> bool:
    """Returns `rollout.offload_trainer`, or its default: only vLLM in the trainer's processes on a GPU needs it."""
    asked = config.rollout.offload_trainer
    return device.type == "cuda" and config.rollout.engine == "vllm" if asked is None else asked


def _state(policy: Policy) -> Iterator[Tensor]:
    """Yields weights, and what the optimizer keeps of them: main copies and moments."""
    for chunk in policy.chunks:
        yield from (parameter.data for parameter in chunk.parameters())
    for optimizer in optimizers(policy):
        for group in optimizer.optimizer.param_groups:
            yield from (parameter.data for parameter in group["params"])
        for kept in optimizer.optimizer.state.values():
            yield from (value for value in kept.values() if isinstance(value, Tensor))


def _gradients(policy: Policy) -> Iterator[Tensor]:
    for chunk in policy.chunks:
        yield from (buffer.grad_data for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers))
        yield from (parameter.grad for parameter in chunk.parameters() if parameter.grad is not None)
    for optimizer in optimizers(policy):
        for group in optimizer.optimizer.param_groups:
            yield from (parameter.grad for parameter in group["params"] if parameter.grad is not None)


def _storages(tensors: Iterable[Tensor], device: torch.device) -> dict[int, UntypedStorage]:
    """Returns each storage once, and only those on `device`: an optimizer may itself keep state in host memory."""
    found: dict[int, UntypedStorage] = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.device.type == device.type and storage.nbytes():
            found.setdefault(storage._cdata, storage)
    return found


def _bytes(storage: UntypedStorage) -> Tensor:
    """Returns a view of the whole storage, [bytes] uint8."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _finish_copies(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

"""`export_weights` beside mbridge's own export, which asks for one tensor at a time: equal bits, and little memory."""

import zlib
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lens_megatron.policy.export import bytes_received, export_weights
from lens_megatron.policy.hf_weights import GroupedNames
from lens_megatron.policy.model import Policy

SMALL = 20_000
"""Bytes of a bucket into which few of the tests' tensors fit, and some not at all."""


class LiveBytes(TorchDispatchMode):
    """The most bytes that storages made within the block took at a time."""

    def __init__(self, known: Iterator[Tensor]):
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in self.known:
                storage = tensor.untyped_storage()
                self.live[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.live = {key: entry for key, entry in self.live.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.live.values()))
        return result


def by_mbridge(policy: Policy) -> dict[str, Tensor]:
    """What a collective of mbridge's makes of the same shards; a tied head counts once."""
    found: dict[str, Tensor] = {}
    with torch.no_grad():
        for name, tensor in policy.bridge.export_weights([GroupedNames(model) for model in policy.models()]):
            found.setdefault(name, tensor.detach().clone())
    return found


def check_export(policy: Policy) -> None:
    """Raises AssertionError unless all is as `export_weights` says, under this layout."""
    expected = by_mbridge(policy)
    for dtype, bucket_bytes in ((None, None), (None, SMALL), (torch.bfloat16, SMALL)):
        names = []
        for name, tensor in export_weights(policy, dtype, bucket_bytes):
            names.append(name)
            wanted = expected[name].to(dtype or expected[name].dtype)
            assert tensor.dtype == wanted.dtype and torch.equal(tensor, wanted), f"{name} differs, as {dtype}"
        assert sorted(names) == sorted(expected), set(names) ^ set(expected)
        order = torch.tensor([zlib.crc32("".join(names).encode())])
        orders = order.new_empty(policy.mesh.world_size)
        torch.distributed.all_gather_into_tensor(orders, order)
        assert (orders == order).all(), "ranks came to another order"
    check_memory(policy, expected)


def check_memory(policy: Policy, expected: dict[str, Tensor]) -> None:
    """Two buckets, and the copies that mbridge makes of one parameter."""
    plan = policy.export_plan
    size = sum(tensor.nbytes for tensor in expected.values())
    ranks = {cut: len(gathering.experts) for cut, gathering in plan.gatherings.items()}
    largest = max(shard.elements * shard.dtype.itemsize * ranks[shard.cut] for shard in plan.shards)
    with LiveBytes(parameter for model in policy.models() for parameter in model.parameters()) as memory:
        for _name, _tensor in export_weights(policy, bucket_bytes=SMALL):
            pass
    bound = 2 * max(SMALL, largest) + 2 * largest
    assert memory.peak <= bound < size, (memory.peak, bound, size)
    shares = plan.mesh.tp_size * plan.mesh.pp_size
    assert memory.peak > 0 and bytes_received(policy, torch.bfloat16) * 2 == bytes_received(policy)
    assert (bytes_received(policy) == 0) == (shares * ranks.get("experts", 1) == 1)

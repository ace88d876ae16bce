"""Streams Megatron shards as whole tensors with Hugging Face names, on every rank that shares the model.

Shards travel in buckets: packed end to end on the stage that has them (cast on the way, so that a narrower type halves
the bytes), broadcast along the pipeline among equal tensor-parallel ranks, then gathered within the stage, and that
only where a tensor is cut. The next bucket is on its way while the last one's tensors are consumed. A tensor that a
rank has whole stays where it is. Names, and the splits of qkv and of gate and up projections, come from mbridge.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import Work

from lens_megatron.policy.export_plan import Cut, ExportBucket, ExportPlan, TensorShard, cut_into_buckets
from lens_megatron.policy.model import Policy

BUCKET_BYTES = {"cuda": 256 << 20, "cpu": 16 << 20}
"""Bytes of a bucket once gathered, by the device's type.

So many bytes make the start of a collective negligible and are little beside the model. On a CPU the C library gives
larger blocks back at once, and the kernel then zeroes the next bucket's pages, which took longer than sending it.
"""


@dataclass(frozen=True, slots=True)
class _Flight:
    """Holds a bucket on its way in a buffer of its own: an engine may keep a tensor until it has the layer's others."""

    bucket: ExportBucket
    buffer: Tensor | None
    """[ranks that divide the tensors, elements of a shard]; None where this rank has all of it already."""
    work: tuple[Work, ...]


@dataclass(frozen=True, slots=True)
class _Cutting:
    """The attributes that mbridge reads from a parameter, for one that this rank may not have."""

    partition_dim: int
    tensor_model_parallel: bool = True


def export_weights(
    policy: Policy, dtype: torch.dtype | None = None, bucket_bytes: int | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Streams every weight once, whole, under its Hugging Face name, in the same order on every rank.

    A collective over the ranks that share a copy of the model, which are all of them if experts are divided: they must
    exhaust it. A tied head is sent as the embedding alone; rows that pad the vocabulary are cut off. Beside the model a
    rank holds two buckets, and a tensor being put together; never the whole model. Tensors may be views: of parameters,
    or of a bucket, which is kept as long as one of them.

    Args:
        dtype: the type of the tensors that are sent and yielded. None: the parameters' type.
        bucket_bytes: the size of a gathered bucket; a larger tensor has one of its own. None: BUCKET_BYTES.
    """
    plan = policy.export_plan
    side = torch.cuda.Stream()  # so that consuming a bucket does not wait for the next one
    buckets = iter(cut_into_buckets(plan, dtype, bucket_bytes or BUCKET_BYTES[plan.mesh.device.type]))
    ahead = _start_next(plan, buckets, side)
    while ahead:
        current, ahead = ahead, None
        _finish(plan, current, side)
        tensors = _unpack(plan, current)
        yield next(tensors)
        # Not before this: until it asked for the second, the consumer held the last tensor of a bucket that is freed.
        ahead = _start_next(plan, buckets, side)
        yield from tensors


def bytes_received(policy: Policy, dtype: torch.dtype | None = None) -> int:
    """Computes how many bytes `export_weights` brings to this rank from others."""
    plan, total = policy.export_plan, 0
    for shard in plan.shards:
        size = shard.elements * (dtype or shard.dtype).itemsize
        total += size * (plan.gatherings[shard.cut].size - 1) + size * (shard.stage != plan.mesh.pp_rank)
    return total


@torch.no_grad()
def _start_next(plan: ExportPlan, buckets: Iterator[ExportBucket], side: torch.cuda.Stream) -> _Flight | None:
    """Packs the next bucket and begins its first collective."""
    bucket = next(buckets, None)
    if bucket is None:
        return None
    mesh, gathering = plan.mesh, plan.gatherings[bucket.cut]
    if mesh.pp_size == 1 and gathering.group is None:
        return _Flight(bucket, None, ())
    buffer = torch.empty(gathering.size, bucket.elements, dtype=bucket.dtype, device=mesh.device)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        mine = buffer[gathering.rank]
        if bucket.stage == mesh.pp_rank:
            for shard, part in _parts(bucket, mine):
                part.copy_(plan.own[shard.name])
        if mesh.pp_size == 1:
            return _Flight(bucket, buffer, _gather(plan, bucket, buffer))
        sender = torch.distributed.get_global_rank(mesh.pp_group, bucket.stage)
        work = torch.distributed.broadcast(mine.view(torch.uint8), sender, group=mesh.pp_group, async_op=True)
    return _Flight(bucket, buffer, (work,))


def _finish(plan: ExportPlan, flight: _Flight, side: torch.cuda.Stream) -> None:
    if flight.buffer is None:
        return
    with torch.cuda.stream(side):
        _wait(flight.work)
        if plan.mesh.pp_size > 1:
            _wait(_gather(plan, flight.bucket, flight.buffer))
    torch.cuda.current_stream().wait_stream(side)


def _gather(plan: ExportPlan, bucket: ExportBucket, buffer: Tensor) -> tuple[Work, ...]:
    """Fills the rows of the buffer that other ranks have; this rank's is in its place."""
    gathering, flat = plan.gatherings[bucket.cut], buffer.view(torch.uint8)
    group = gathering.group
    if group is None:
        return ()
    if buffer.is_cuda:
        mine = flat[gathering.rank]
        return (torch.distributed.all_gather_into_tensor(flat.view(-1), mine, group=group, async_op=True),)
    # gloo's all-gather of large tensors took five times as long as a broadcast from each rank.
    senders = [torch.distributed.get_global_rank(group, rank) for rank in range(gathering.size)]
    return tuple(
        torch.distributed.broadcast(row, sender, group=group, async_op=True)
        for row, sender in zip(flat, senders, strict=True)
    )


def _wait(work: tuple[Work, ...]) -> None:
    for each in work:
        each.wait()


def _parts(bucket: ExportBucket, row: Tensor) -> Iterator[tuple[TensorShard, Tensor]]:
    """The bucket's shards as views of a row of the buffer."""
    start = 0
    for shard in bucket.shards:
        yield shard, row[start : start + shard.elements].view(shard.shape)
        start += shard.elements


def _unpack(plan: ExportPlan, flight: _Flight) -> Iterator[tuple[str, Tensor]]:
    bucket, rows = flight.bucket, flight.buffer
    if rows is None:
        for shard in bucket.shards:
            yield from _whole_tensors(plan, shard, [plan.own[shard.name].detach().to(bucket.dtype)])
        return
    first = bucket.shards[0]
    if len(bucket.shards) == 1 and first.cut is Cut.TENSOR and first.dim == 0 and not _is_gated(first):
        yield from _whole_tensors(plan, first, [rows.view(-1, *first.shape[1:])])  # the rows of the buffer are joined
        return
    for parts in zip(*(_parts(bucket, row) for row in rows), strict=True):
        yield from _whole_tensors(plan, parts[0][0], [part for _, part in parts])


def _is_gated(shard: TensorShard) -> bool:
    """Returns whether each rank has a part of the gate projection, then one of the up projection."""
    return ".linear_fc1." in shard.name


@torch.no_grad()
def _converted(plan: ExportPlan, name: str, parts: list[Tensor], dim: int) -> list[tuple[str, Tensor]]:
    whole = parts[0] if len(parts) == 1 else plan.bridge._weight_merge_across_tp(name, parts, _Cutting(dim))
    return list(zip(*plan.bridge._weight_to_hf_format(name, whole), strict=True))


def _whole_tensors(plan: ExportPlan, shard: TensorShard, parts: list[Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yields the whole tensors that the ranks' shards make together. Each expert-parallel rank has other experts."""
    if shard.cut is not Cut.EXPERTS:
        yield from _converted(plan, shard.name, parts, shard.dim)
        return
    stem, local = shard.name.rsplit("weight", 1)
    owners = plan.gatherings[shard.cut].experts
    for owner in sorted(set(owners)):
        name = f"{stem}weight{owner * plan.local_experts + int(local)}"
        own = [part for part, rank in zip(parts, owners, strict=True) if rank == owner]
        yield from _converted(plan, name, own, shard.dim)

"""One set of weights to all servers of a pool, in one pass: begun, bucket by bucket, finished. Runs in the pool's loop.

A server that fails on the way is dead, and the others go on. Only one that answers, after everything, with the label of
these weights may sample again. One that is started again later is given the same weights, of which the pool has a copy.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any

from lens_megatron.rollout.servers import health, weight_transfer
from lens_megatron.rollout.servers.client import ServerError
from lens_megatron.rollout.servers.health import Event
from lens_megatron.rollout.servers.pool import Member, ServerPool
from lens_megatron.rollout.servers.weight_transfer import KeptBucket, make_link

INCOMPLETE = "incomplete"
"""Label of weights that are not a whole model's."""


def loading(pool: ServerPool) -> list[Member]:
    """Those that have taken part so far, without a failure."""
    return [member for member in pool.members if member.known.loading]


async def begin(pool: ServerPool) -> None:
    """Makes servers ready to receive; waits for one that is being restarted if there is no other."""
    pool.version, pool.kept = None, ()
    deadline = time.monotonic() + pool.limits.start_s
    while loading(pool):  # one is being given the weights before these
        await asyncio.sleep(pool.limits.probe_interval_s / 4)
    while not any(health.loadable(member.known) for member in pool.members):
        if not any(pool.comes_back(member) for member in pool.members) or time.monotonic() > deadline:
            return
        await asyncio.sleep(pool.limits.probe_interval_s / 4)
    for member in pool.members:
        if health.loadable(member.known):
            pool.tell(member, Event.LOADING)
    await _open(pool, pool.members)


async def send(pool: ServerPool, update_info: dict[str, Any], payload: object) -> None:
    """One bucket to all: what it holds, by HTTP, and its bytes over the link, which the server reads meanwhile."""
    await _send(pool, pool.members, update_info, payload)


async def finish(pool: ServerPool, version: int, label: str, kept: Sequence[KeptBucket]) -> None:
    """Args:
    kept: all buckets, for servers that come later.
    """
    pool.version, pool.kept = version, tuple(kept)
    pool.expected = replace(pool.expected, label=label, version=version)
    await _close(pool, pool.members)


async def reload(pool: ServerPool, member: Member) -> None:
    """The current weights to one server that has others, or none."""
    kept, only = pool.kept, [member]
    pool.tell(member, Event.RELOADING)
    await _open(pool, only)
    for bucket in kept:
        if member.known.loading:
            await _send(pool, only, bucket.update_info, await asyncio.to_thread(weight_transfer.restored, bucket))
    await _close(pool, only)


async def _open(pool: ServerPool, members: Sequence[Member]) -> None:
    await _each(pool, members, _connect, Event.GIVEN_UP)
    await _each(pool, members, lambda pool, member: _post(pool, member, "/start_weight_update"), Event.LOAD_BROKE_OFF)


async def _send(pool: ServerPool, members: Sequence[Member], update_info: dict[str, Any], payload: object) -> None:
    async def work(pool: ServerPool, member: Member) -> None:
        told = asyncio.create_task(_post(pool, member, "/update_weights", {"update_info": update_info}))
        try:
            await asyncio.to_thread(member.link.send, payload)
        except RuntimeError:
            done, _ = await asyncio.wait([told], timeout=pool.limits.answer_s)
            if done and told.exception():
                raise told.exception() from None  # the server knows why it hung up
            raise
        finally:
            if not told.done():
                await asyncio.wait([told], timeout=pool.limits.bucket_s)
            told.cancel()
        await told

    await _each(pool, members, work, Event.LOAD_BROKE_OFF)


async def _close(pool: ServerPool, members: Sequence[Member]) -> None:
    expected = pool.expected

    async def work(pool: ServerPool, member: Member) -> None:
        await _post(pool, member, "/finish_weight_update", {"weight_version": expected.label})
        await member.client.reset_prefix_cache(pool.limits.answer_s)
        if (found := await member.client.version(pool.limits.answer_s)) != expected.label:
            raise ServerError(f"it says that it has weights {found!r}, and was given {expected.label!r}")
        await _post(pool, member, "/resume")
        pool.tell(member, Event.LOADED, version=expected.version)

    await _each(pool, members, work, Event.LOAD_BROKE_OFF)


async def abandon(pool: ServerPool) -> None:
    """After a mistake in the stream: servers are left so that they can be loaded again, and sample nothing before."""

    async def work(pool: ServerPool, member: Member) -> None:
        await _post(pool, member, "/finish_weight_update", {"weight_version": INCOMPLETE})
        await _post(pool, member, "/resume")
        pool.tell(member, Event.OTHER_VERSION, reason="its weights are incomplete")

    await _each(pool, pool.members, work, Event.LOAD_BROKE_OFF)


async def _connect(pool: ServerPool, member: Member) -> None:
    await _post(pool, member, "/pause?mode=abort")
    if member.link is not None:
        return
    workers = (await member.client.get("/get_world_size", pool.limits.answer_s))["world_size"]
    link = make_link(member.link_address(), workers, pool.limits.bucket_s)
    joining = asyncio.create_task(asyncio.to_thread(link.join))
    try:
        await _post(pool, member, "/init_weight_transfer_engine", {"init_info": link.init_info()})
        await joining
    except BaseException:
        link.close()  # the thread that waits for the workers ends by that
        joining.cancel()
        raise
    member.link = link


async def _post(pool: ServerPool, member: Member, path: str, body: dict[str, Any] | None = None) -> None:
    await member.client.post(path, pool.limits.bucket_s, body)


async def _each(
    pool: ServerPool,
    members: Sequence[Member],
    work: Callable[[ServerPool, Member], Awaitable[None]],
    on_failure: Event,
) -> None:
    """Does `work` with those that take part, at once; tells `on_failure` of those with which it fails."""

    async def one(member: Member) -> None:
        try:
            await asyncio.wait_for(work(pool, member), 2 * pool.limits.bucket_s)
        except (ServerError, RuntimeError, TimeoutError, KeyError) as error:
            pool.tell(member, on_failure, reason=f"while weights were loaded: {error or type(error).__name__}")

    await asyncio.gather(*(one(member) for member in members if member.known.loading))

"""Loads one set of weights into all servers of a pool: `begin`, then `send` for every bucket, then `finish`.

A server that fails on the way counts as dead, and the others go on. A server may sample again only if it names, after
the last bucket, the label of these weights. A server that is started again later is given the same weights, of which
the pool keeps a copy. Everything here runs in the pool's loop.
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
"""The label of weights that are not those of a whole model."""


def loading(pool: ServerPool) -> list[Member]:
    """The servers that have taken part in the load without a failure so far."""
    return [member for member in pool.members if member.health.loading]


async def begin(pool: ServerPool) -> None:
    """Makes the servers ready to receive weights. Where all are being restarted, it waits for one of them."""
    pool.version, pool.kept_buckets = None, ()
    deadline = time.monotonic() + pool.limits.start_s
    while loading(pool):  # a server is still being given the weights before these
        await asyncio.sleep(pool.limits.probe_interval_s / 4)
    while not any(health.loadable(member.health) for member in pool.members):
        if not any(pool.may_serve_again(member) for member in pool.members) or time.monotonic() > deadline:
            return
        await asyncio.sleep(pool.limits.probe_interval_s / 4)
    for member in pool.members:
        if health.loadable(member.health):
            pool.report(member, Event.LOADING)
    await _open(pool, pool.members)


async def send(pool: ServerPool, update_info: dict[str, Any], payload: object) -> None:
    """Sends one bucket to all servers: names and shapes by HTTP, and the bytes over the link meanwhile."""
    await _send(pool, pool.members, update_info, payload)


async def finish(pool: ServerPool, version: int, label: str, kept: Sequence[KeptBucket]) -> None:
    """Ends the load of weights `version`, and lets those servers sample that name `label` as what they have.

    Args:
        kept: all buckets, for servers that are started later.
    """
    pool.version, pool.kept_buckets = version, tuple(kept)
    pool.expected = replace(pool.expected, label=label, version=version)
    await _close(pool, pool.members)


async def reload(pool: ServerPool, member: Member) -> None:
    """Sends the current weights to one server that has others, or none."""
    kept, only = pool.kept_buckets, [member]
    pool.report(member, Event.RELOADING)
    await _open(pool, only)
    for bucket in kept:
        if member.health.loading:
            await _send(pool, only, bucket.update_info, await asyncio.to_thread(weight_transfer.restore, bucket))
    await _close(pool, only)


async def _open(pool: ServerPool, members: Sequence[Member]) -> None:
    await _each(pool, members, _connect, Event.GIVEN_UP)
    await _each(pool, members, lambda pool, member: _post(pool, member, "/start_weight_update"), Event.LOAD_BROKE_OFF)


async def _send(pool: ServerPool, members: Sequence[Member], update_info: dict[str, Any], payload: object) -> None:
    async def send_to(pool: ServerPool, member: Member) -> None:
        if member.link is None:
            raise RuntimeError("it has no connection for weights")
        told = asyncio.create_task(_post(pool, member, "/update_weights", {"update_info": update_info}))
        try:
            await asyncio.to_thread(member.link.send, payload)
        except RuntimeError:
            done, _ = await asyncio.wait([told], timeout=pool.limits.answer_s)
            if done and (reason := told.exception()):
                raise reason from None  # the server knows why it closed the connection
            raise
        finally:
            if not told.done():
                await asyncio.wait([told], timeout=pool.limits.bucket_s)
            told.cancel()
        await told

    await _each(pool, members, send_to, Event.LOAD_BROKE_OFF)


async def _close(pool: ServerPool, members: Sequence[Member]) -> None:
    expected = pool.expected

    async def work(pool: ServerPool, member: Member) -> None:
        await _post(pool, member, "/finish_weight_update", {"weight_version": expected.label})
        await member.client.reset_prefix_cache(pool.limits.answer_s)
        if (found := await member.client.version(pool.limits.answer_s)) != expected.label:
            raise ServerError(f"it says that it has weights {found!r}, and was given {expected.label!r}")
        await _post(pool, member, "/resume")
        pool.report(member, Event.LOADED, version=expected.version)

    await _each(pool, members, work, Event.LOAD_BROKE_OFF)


async def abandon(pool: ServerPool) -> None:
    """Ends a load whose stream of weights had an error. Servers sample nothing until they are loaded again."""

    async def work(pool: ServerPool, member: Member) -> None:
        await _post(pool, member, "/finish_weight_update", {"weight_version": INCOMPLETE})
        await _post(pool, member, "/resume")
        pool.report(member, Event.OTHER_VERSION, reason="its weights are incomplete")

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
    """Does `work` for all servers of the load at once, and reports `on_failure` for those with which it fails."""

    async def one(member: Member) -> None:
        try:
            await asyncio.wait_for(work(pool, member), 2 * pool.limits.bucket_s)
        except (ServerError, RuntimeError, TimeoutError, KeyError) as error:
            pool.report(member, on_failure, reason=f"while weights were loaded: {error or type(error).__name__}")

    await asyncio.gather(*(one(member) for member in members if member.health.loading))

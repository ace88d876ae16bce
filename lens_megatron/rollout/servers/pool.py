"""Manages the servers of one rank: gives them requests, checks their answers, watches them, restarts the dead ones.

Everything here runs in one asyncio loop; other threads use `engine.py`. `health.py` decides which server may do what;
this module finds out what happens to the servers, reports it there, and carries out what follows.
"""

import asyncio
import logging
import secrets
import time
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from lens_megatron.rollout.engine import Completion, Request
from lens_megatron.rollout.servers import health
from lens_megatron.rollout.servers.client import (
    UNLOADED,
    Client,
    Expected,
    OtherVersionError,
    ServerError,
    completion_of,
    generate_body,
)
from lens_megatron.rollout.servers.health import Event, Limits, ServerHealth, ServerState
from lens_megatron.rollout.servers.process import ServerProcess
from lens_megatron.rollout.servers.weight_transfer import KeptBucket, Link
from lens_megatron.supervision.channel import Address, address_towards

logger = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Member:
    """One server of the pool."""

    name: str
    session: aiohttp.ClientSession
    process: ServerProcess | None = None
    """The server's process; None if somebody else started it."""
    address: str = "http://localhost"
    """http://host:port of a server that somebody else started."""
    health: ServerHealth = ServerHealth()
    link: Link | None = None
    running: dict[int, asyncio.Task[None]] = field(default_factory=dict)
    """The tasks that wait for its completions, by request id."""
    started_at: float = 0.0
    died_at: float = 0.0
    start_error: ServerError | None = None
    """The last answer to the question whether it has started."""

    @property
    def client(self) -> Client:
        return Client(self.address, self.session)

    def link_address(self) -> Address:
        """Returns where the trainer may listen so that this server reaches it, and as few others as possible."""
        if self.process is not None:
            return self.process.path_in_folder(f"weights_{secrets.token_hex(4)}")
        return [address_towards(*self.client.host_and_port), 0]

    def close_link(self) -> None:
        if self.link is not None:
            self.link.close()
            self.link = None


class ServerPool:
    """The servers of one rank, and the requests that they have, wait for, or can no longer serve.

    Args:
        per_server: how many requests a server is given at once.
        expected: what completions must agree with; the version of the weights changes with each load.
        reload: sends `kept_buckets` to one server.
        waits_for_restarts: whether requests wait for servers that may serve again, since no other rank takes them.
    """

    def __init__(
        self,
        per_server: int,
        expected: Expected,
        limits: Limits,
        reload: Callable[["ServerPool", "Member"], Coroutine[Any, Any, None]],
        *,
        waits_for_restarts: bool,
    ):
        self.per_server, self.expected, self.limits = per_server, expected, limits
        self.reload, self.waits_for_restarts = reload, waits_for_restarts
        self.members: list[Member] = []
        self.version: int | None = None
        """The version of the weights last loaded."""
        self.kept_buckets: Sequence[KeptBucket] = ()
        """The weights last loaded."""
        self.requests: dict[int, Request] = {}
        """All requests that are neither finished nor lost, by their ids."""
        self.waiting: deque[Request] = deque()
        self.finished: list[Completion] = []
        self.lost: list[Request] = []
        """Requests that no server of this pool can serve."""
        self.generated = 0
        """The number of tokens of all completions."""
        self.changed = asyncio.Event()
        """Set when a request is finished or lost, or a task has failed."""
        self.restarts_dead = False
        """True if dead servers are started again; it is False until all have started for the first time."""
        self.failure: BaseException | None = None
        """An exception that a task of this pool did not expect."""
        self.tasks: set[asyncio.Task[None]] = set()

    def add_process(self, process: ServerProcess) -> None:
        """Adds a server that this rank has started."""
        session = _session(process.key, process.socket_path)
        self._add(Member(process.name, session, process, started_at=time.monotonic()))

    def add_external(self, address: str, key: str) -> None:
        """Adds a server that somebody else has started."""
        self._add(Member(f"server {address}", _session(key), address=address, started_at=time.monotonic()))

    def _add(self, member: Member) -> None:
        self.members.append(member)
        self._spawn(self._watch(member))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self._end_task)
        return task

    def _end_task(self, task: asyncio.Task[None]) -> None:
        self.tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            self.failure = task.exception()
            self.changed.set()

    async def close(self) -> None:
        tasks = [*self.tasks]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for member in self.members:
            member.close_link()
            await member.session.close()

    def submit(self, requests: Sequence[Request]) -> None:
        self.requests |= {request.request_id: request for request in requests}
        self.waiting += requests
        self._assign_waiting()

    def cancel(self, request_ids: set[int]) -> None:
        """Forgets requests; vLLM forgets a request when its connection is closed."""
        for member in self.members:
            for number in request_ids & member.running.keys():
                member.running.pop(number).cancel()
        self.waiting = deque(r for r in self.waiting if r.request_id not in request_ids)
        self.finished = [c for c in self.finished if c.request_id not in request_ids]
        self.lost = [r for r in self.lost if r.request_id not in request_ids]
        for number in request_ids:
            self.requests.pop(number, None)
        self._assign_waiting()

    def capacity(self) -> int:
        """The number of requests that the servers which serve can have at once."""
        return self.per_server * sum(health.serving(member.health, self.version) for member in self.members)

    def may_serve_again(self, member: Member) -> bool:
        """Returns whether it may serve later without other weights, though it does not now."""
        now, limits = member.health, self.limits
        if now.state is ServerState.RESTARTING or now.loading or health.reloadable(now, limits):
            return True
        return member.process is not None and self.restarts_dead and health.restartable(now, limits)

    def hopeless(self) -> bool:
        """Returns whether no server serves, and none may before other weights are loaded."""
        return not any(health.serving(m.health, self.version) or self.may_serve_again(m) for m in self.members)

    def running(self) -> int:
        return sum(len(member.running) for member in self.members)

    def _assign_waiting(self) -> None:
        """Gives waiting requests to the servers with the fewest, and gives up those that no server can serve."""
        eligible = [member for member in self.members if health.eligible(member.health, self.version)]
        while self.waiting and eligible:
            member = min(eligible, key=lambda member: len(member.running))
            if len(member.running) >= self.per_server:
                break
            request = self.waiting.popleft()
            member.running[request.request_id] = self._spawn(self._serve(member, request))
        if self.waiting and not self.capacity() and (self.hopeless() or not self.waits_for_restarts):
            for request in self.waiting:
                del self.requests[request.request_id]
            self.lost += self.waiting
            self.waiting.clear()
            self.changed.set()

    async def _serve(self, member: Member, request: Request) -> None:
        sent_at = time.monotonic()
        completion: Completion | None = None
        try:
            body = generate_body(request, self.expected.end_tokens)
            reply = await member.client.post("/inference/v1/generate", None, body)
            completion = completion_of(reply, request, self.expected)
        except OtherVersionError as error:
            self._set_health(member, health.after(member.health, Event.OTHER_VERSION, self.limits, reason=str(error)))
        except ServerError as error:
            self._set_health(member, health.failed(member.health, sent_at, time.monotonic(), self.limits, str(error)))
        if member.running.get(request.request_id) is not asyncio.current_task():
            return  # it was taken from this server meanwhile
        del member.running[request.request_id]
        if completion is not None:
            self._set_health(member, health.after(member.health, Event.SERVED, self.limits))
            del self.requests[request.request_id]
            self.finished.append(completion)
            self.generated += len(completion.token_ids)
            self.changed.set()
        else:
            self.waiting.appendleft(request)
        self._assign_waiting()

    def _set_health(self, member: Member, now: ServerHealth) -> None:
        """Notes that the server's health is `now`; where its state has changed, does what follows from that."""
        before, member.health = member.health, now
        if now.state is before.state:
            return
        bad = now.state in (ServerState.DEAD, ServerState.SUSPECT) or (
            now.state is ServerState.STALE and not now.loading
        )
        first_start = before.state is ServerState.RESTARTING and now.starts == 0 and now.state is ServerState.STALE
        if (bad and not first_start) or before.state in (ServerState.DEAD, ServerState.SUSPECT):
            why = f": {now.reason}" if bad and now.reason else ""
            logger.info(f"{member.name}: {before.state} -> {now.state}{why}")
        if not health.serving(now, self.version):
            for number, task in member.running.items():
                task.cancel()
                self.waiting.appendleft(self.requests[number])
            member.running.clear()
        if now.state is ServerState.DEAD:
            member.died_at = time.monotonic()
            member.close_link()
        self._assign_waiting()

    def report(self, member: Member, event: Event, *, version: int | None = None, reason: str = "") -> None:
        """Notes that `event` has happened to the server; for the arguments see `health.after`."""
        self._set_health(member, health.after(member.health, event, self.limits, version=version, reason=reason))

    async def _watch(self, member: Member) -> None:
        """Looks after one server, until the pool is closed."""
        while True:
            if member.process is not None and member.health.state is not ServerState.DEAD:
                if (status := member.process.status()) is not None:
                    self.report(member, Event.EXITED, reason=f"ended with status {status}; {member.process.log}")
            match member.health.state:
                case ServerState.RESTARTING:
                    await self._await_start(member)
                case ServerState.DEAD:
                    if self.restarts_dead:
                        await self._restart(member)
                case ServerState.STALE if self.kept_buckets and health.reloadable(member.health, self.limits):
                    await self._reload(member)
                case _:
                    await self._probe(member)
            await asyncio.sleep(self.limits.probe_interval_s)

    async def _await_start(self, member: Member) -> None:
        try:
            await member.client.version(self.limits.answer_s)
            self.report(member, Event.STARTED)
            return
        except ServerError as error:
            member.start_error = error
        if time.monotonic() - member.started_at > self.limits.start_s:
            self.report(member, Event.GIVEN_UP, reason=f"no answer {self.limits.start_s:.0f} s after its start")

    async def _restart(self, member: Member) -> None:
        """Starts a dead server again when its time has come, or finds out whether somebody else has."""
        if member.process is None:
            with suppress(ServerError):
                if await member.client.version(self.limits.answer_s) == UNLOADED:
                    self.report(member, Event.EXITED, reason=member.health.reason)  # another process than before
                self.report(member, Event.STARTED)
        elif health.restartable(member.health, self.limits):
            await asyncio.to_thread(member.process.stop)  # the process may still be there and hang
            if time.monotonic() < member.died_at + health.backoff_s(member.health, self.limits):
                return
            member.started_at = time.monotonic()
            self.report(member, Event.STARTING)
            try:
                member.process.start()
            except OSError as error:
                self.report(member, Event.EXITED, reason=f"cannot be started: {error}")
                return
            await member.session.close()
            member.session = _session(member.process.key, member.process.socket_path)
        else:
            await asyncio.to_thread(member.process.stop)

    async def _reload(self, member: Member) -> None:
        version = self.version
        await self.reload(self, member)
        if health.serving(member.health, version):
            logger.info(f"{member.name}: serves again, with weights of version {version}")
        self._assign_waiting()

    async def _probe(self, member: Member) -> None:
        try:
            tokens = await member.client.tokens(self.limits.answer_s)
        except ServerError as error:
            self.report(member, Event.SILENT, reason=str(error))
            return
        self.report(member, Event.ANSWERED)
        busy, now = bool(member.running), time.monotonic()
        self._set_health(member, health.progressed(member.health, tokens, busy, now, self.limits))
        self._assign_waiting()


def _session(key: str, socket_path: str | None = None) -> aiohttp.ClientSession:
    # The server closes a connection after 5 s without a request, and a request sent just then would be lost.
    keepalive_s, limit = 2.0, 0
    connector: aiohttp.BaseConnector = (
        aiohttp.TCPConnector(limit=limit, keepalive_timeout=keepalive_s)
        if socket_path is None
        else aiohttp.UnixConnector(socket_path, limit=limit, keepalive_timeout=keepalive_s)
    )
    return aiohttp.ClientSession(headers={"Authorization": f"Bearer {key}"}, connector=connector)

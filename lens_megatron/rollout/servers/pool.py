"""The servers that one rank drives: requests dealt out, answers checked, the dead buried and started again.

Everything here runs in one asyncio loop; `engine.py` is what other threads see. Which server may do what is
decided by `health.py`; here its events are found out and its decisions carried out.
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
from lens_megatron.rollout.servers.health import Event, Limits, Server, ServerState
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
    """None: somebody else started it."""
    address: str = "http://localhost"
    """http://host:port, of a server that somebody else started."""
    known: Server = Server()
    link: Link | None = None
    running: dict[int, asyncio.Task] = field(default_factory=dict)
    """Requests that it works on."""
    started_at: float = 0.0
    died_at: float = 0.0
    trouble: ServerError | None = None
    """Why it counts as not started yet."""

    @property
    def client(self) -> Client:
        return Client(self.address, self.session)

    def link_address(self) -> Address:
        """Where the trainer may listen so that this server reaches it, and as few others as possible."""
        if self.process is not None:
            return str(self.process.folder / f"weights_{secrets.token_hex(4)}")
        return [address_towards(*self.client.host_and_port), 0]

    def close_link(self) -> None:
        if self.link is not None:
            self.link.close()
            self.link = None


class ServerPool:
    """Args:
    per_server: requests that a server is given at once.
    expected: what completions must agree with, but for the weights.
    reload: sends `kept` to a server.
    patient: requests wait for servers that may serve again, since nobody else takes them.
    """

    def __init__(
        self,
        per_server: int,
        expected: Expected,
        limits: Limits,
        reload: Callable[["ServerPool", "Member"], Coroutine[Any, Any, None]],
        *,
        patient: bool,
    ):
        self.per_server, self.expected, self.limits = per_server, expected, limits
        self.reload, self.patient = reload, patient
        self.members: list[Member] = []
        self.version: int | None = None
        """Of the weights last loaded."""
        self.kept: Sequence[KeptBucket] = ()
        """Those weights."""
        self.requests: dict[int, Request] = {}
        """Neither finished nor lost."""
        self.waiting: deque[Request] = deque()
        self.finished: list[Completion] = []
        self.lost: list[Request] = []
        """No server of this pool can serve them."""
        self.generated = 0
        self.news = asyncio.Event()
        """Something is finished or lost."""
        self.revives = False
        """Dead servers are started again without being asked to."""
        self.failure: BaseException | None = None
        """A mistake of ours in a background task."""
        self.background: set[asyncio.Task] = set()

    def add_process(self, process: ServerProcess) -> None:
        """One that was started."""
        session = _session(process.key, process.socket_path)
        self._add(Member(process.name, session, process, started_at=time.monotonic()))

    def add_given(self, address: str, key: str) -> None:
        self._add(Member(f"server {address}", _session(key), address=address, started_at=time.monotonic()))

    def _add(self, member: Member) -> None:
        self.members.append(member)
        self._spawn(self._watch(member))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task:
        task = asyncio.create_task(work)
        self.background.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task) -> None:
        self.background.discard(task)
        if not task.cancelled() and task.exception() is not None:
            self.failure = task.exception()
            self.news.set()

    async def close(self) -> None:
        tasks = [*self.background]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for member in self.members:
            member.close_link()
            await member.session.close()

    def submit(self, requests: Sequence[Request]) -> None:
        self.requests |= {request.request_id: request for request in requests}
        self.waiting += requests
        self.assign()

    def cancel(self, request_ids: set[int]) -> None:
        """Closing a connection makes vLLM forget the request."""
        for member in self.members:
            for number in request_ids & member.running.keys():
                member.running.pop(number).cancel()
        self.waiting = deque(r for r in self.waiting if r.request_id not in request_ids)
        self.finished = [c for c in self.finished if c.request_id not in request_ids]
        self.lost = [r for r in self.lost if r.request_id not in request_ids]
        for number in request_ids:
            self.requests.pop(number, None)
        self.assign()

    def capacity(self) -> int:
        return self.per_server * sum(health.serving(member.known, self.version) for member in self.members)

    def comes_back(self, member: Member) -> bool:
        """Whether it may serve some time, though it does not now."""
        known, limits = member.known, self.limits
        if known.state is ServerState.RESTARTING or known.loading or health.reloadable(known, limits):
            return True
        return member.process is not None and self.revives and health.restartable(known, limits)

    def hopeless(self) -> bool:
        """No server serves, nor may one before other weights are loaded."""
        return not any(health.serving(m.known, self.version) or self.comes_back(m) for m in self.members)

    def running(self) -> int:
        return sum(len(member.running) for member in self.members)

    def assign(self) -> None:
        """Gives what waits to the servers with the fewest requests. Gives up what no server can serve any more."""
        eligible = [member for member in self.members if health.eligible(member.known, self.version)]
        while self.waiting and eligible:
            member = min(eligible, key=lambda member: len(member.running))
            if len(member.running) >= self.per_server:
                break
            request = self.waiting.popleft()
            member.running[request.request_id] = self._spawn(self._serve(member, request))
        if self.waiting and not self.capacity() and (self.hopeless() or not self.patient):
            for request in self.waiting:
                del self.requests[request.request_id]
            self.lost += self.waiting
            self.waiting.clear()
            self.news.set()

    async def _serve(self, member: Member, request: Request) -> None:
        sent_at, bad_news = time.monotonic(), None
        try:
            body = generate_body(request, self.expected.end_tokens)
            reply = await member.client.post("/inference/v1/generate", None, body)
            completion = completion_of(reply, request, self.expected)
        except OtherVersionError as error:
            bad_news = error
            self._move(member, health.after(member.known, Event.OTHER_VERSION, self.limits, reason=str(error)))
        except ServerError as error:
            bad_news = error
            self._move(member, health.failed(member.known, sent_at, time.monotonic(), self.limits, str(error)))
        if member.running.get(request.request_id) is not asyncio.current_task():
            return  # it was taken from this server meanwhile
        del member.running[request.request_id]
        if bad_news is None:
            self._move(member, health.after(member.known, Event.SERVED, self.limits))
            del self.requests[request.request_id]
            self.finished.append(completion)
            self.generated += len(completion.token_ids)
            self.news.set()
        else:
            self.waiting.appendleft(request)
        self.assign()

    def _move(self, member: Member, known: Server) -> None:
        """Takes `known` for what is known now, and does what follows from it."""
        before, member.known = member.known, known
        if known.state is before.state:
            return
        bad = known.state in (ServerState.DEAD, ServerState.SUSPECT) or (
            known.state is ServerState.STALE and not known.loading
        )
        first_start = before.state is ServerState.RESTARTING and known.starts == 0 and known.state is ServerState.STALE
        if (bad and not first_start) or before.state in (ServerState.DEAD, ServerState.SUSPECT):
            why = f": {known.reason}" * bool(bad and known.reason)
            logger.info(f"{member.name}: {before.state} -> {known.state}{why}")
        if not health.serving(known, self.version):
            for number, task in member.running.items():
                task.cancel()
                self.waiting.appendleft(self.requests[number])
            member.running.clear()
        if known.state is ServerState.DEAD:
            member.died_at = time.monotonic()
            member.close_link()
        self.assign()

    def tell(self, member: Member, event: Event, *, version: int | None = None, reason: str = "") -> None:
        self._move(member, health.after(member.known, event, self.limits, version=version, reason=reason))

    async def _watch(self, member: Member) -> None:
        """For as long as the pool lives: looks after one server."""
        while True:
            status = member.process.status() if member.process else None
            if status is not None and member.known.state is not ServerState.DEAD:
                self.tell(member, Event.EXITED, reason=f"ended with status {status}; {member.process.log}")
            match member.known.state:
                case ServerState.RESTARTING:
                    await self._await_start(member)
                case ServerState.DEAD:
                    if self.revives:
                        await self.revive(member)
                case ServerState.STALE if self.kept and health.reloadable(member.known, self.limits):
                    await self._reload(member)
                case _:
                    await self._probe(member)
            await asyncio.sleep(self.limits.probe_interval_s)

    async def _await_start(self, member: Member) -> None:
        try:
            await member.client.version(self.limits.answer_s)
            self.tell(member, Event.STARTED)
            return
        except ServerError as error:
            member.trouble = error
        if time.monotonic() - member.started_at > self.limits.start_s:
            self.tell(member, Event.GIVEN_UP, reason=f"no answer {self.limits.start_s:.0f} s after its start")

    async def revive(self, member: Member) -> None:
        if member.process is None:
            with suppress(ServerError):
                if await member.client.version(self.limits.answer_s) == UNLOADED:
                    self.tell(member, Event.EXITED, reason=member.known.reason)  # another process than before
                self.tell(member, Event.STARTED)
        elif health.restartable(member.known, self.limits):
            await asyncio.to_thread(member.process.stop)  # it may be there still, and hang
            if time.monotonic() < member.died_at + health.backoff_s(member.known, self.limits):
                return
            member.started_at = time.monotonic()
            self.tell(member, Event.STARTING)
            try:
                member.process.start()
            except OSError as error:
                self.tell(member, Event.EXITED, reason=f"cannot be started: {error}")
                return
            await member.session.close()
            member.session = _session(member.process.key, member.process.socket_path)
        else:
            await asyncio.to_thread(member.process.stop)

    async def _reload(self, member: Member) -> None:
        version = self.version
        await self.reload(self, member)
        if health.serving(member.known, version):
            logger.info(f"{member.name}: serves again, with weights of version {version}")
        self.assign()

    async def _probe(self, member: Member) -> None:
        try:
            load = await member.client.load(self.limits.answer_s)
        except ServerError as error:
            self.tell(member, Event.SILENT, reason=str(error))
            return
        self.tell(member, Event.ANSWERED)
        busy, now = bool(member.running), time.monotonic()
        self._move(member, health.progressed(member.known, load.tokens, busy, now, self.limits))
        self.assign()


def _session(key: str, socket_path: str | None = None) -> aiohttp.ClientSession:
    # The server closes a connection after 5 s without a request, and a request sent just then would be lost.
    options = {"limit": 0, "keepalive_timeout": 2}
    if socket_path is None:
        connector: aiohttp.BaseConnector = aiohttp.TCPConnector(**options)
    else:
        connector = aiohttp.UnixConnector(socket_path, **options)
    return aiohttp.ClientSession(headers={"Authorization": f"Bearer {key}"}, connector=connector)

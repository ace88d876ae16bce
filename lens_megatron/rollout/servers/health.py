"""Decides which servers may sample: a state machine without I/O, clocks or threads, which `pool.py` tells of events.

    restarting --started--> stale --loaded, or loaded again--> healthy <--answers, is silent--> suspect
        ^                     ^                  |                                |
        '------- dead         '--- loading, another version ---------'   too often silent, or bad, or stuck: dead

Only a load of the current weights leads to `healthy`; every event that puts a server's weights in doubt leads away.
"""

from dataclasses import dataclass, replace
from enum import StrEnum


class ServerState(StrEnum):
    RESTARTING = "restarting"
    """Its process has been started and does not answer yet."""
    STALE = "stale"
    """It answers; its weights are not known to be the current ones."""
    HEALTHY = "healthy"
    SUSPECT = "suspect"
    """It has the current weights, but did not answer a moment ago, and so gets no new requests."""
    DEAD = "dead"


class Event(StrEnum):
    STARTING = "starting"
    """Its process has been started again."""
    STARTED = "started"
    """It has answered for the first time since it was started or was dead."""
    ANSWERED = "answered"
    """A probe was answered."""
    SILENT = "silent"
    """A probe was not answered in time."""
    SERVED = "served"
    """It has sent a completion that passed every check."""
    EXITED = "exited"
    GIVEN_UP = "given up"
    """It cannot be reached, or does not start, and the time to wait for it is over."""
    LOADING = "loading"
    """New weights are about to be sent to it."""
    RELOADING = "reloading"
    """The current weights are about to be sent to it alone, because it has been started again."""
    LOADED = "loaded"
    """It has received all of them, and names their version."""
    LOAD_BROKE_OFF = "load broke off"
    """A load has ended early, so that it has parts of two models."""
    OTHER_VERSION = "other version"
    """It says that its weights are not those last loaded."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits on waiting for servers and on trying them again. Times are in seconds."""

    silent_probes: int = 3
    """A server is dead when it has not answered this number of probes in a row."""
    failures: int = 3
    """A server is dead after this number of failed requests in a row. Those that were under way together count once."""
    stuck_s: float = 120.0
    """A server is dead when it has requests and has generated no token for this time."""
    restarts: int = 3
    """The number of times in a row that a server is restarted without a completion, or its weights are sent again."""
    backoff_s: float = 1.0
    """The wait before the first restart in a row; it doubles with each further one."""
    probe_interval_s: float = 1.0
    answer_s: float = 15.0
    """The time for any answer but a completion."""
    bucket_s: float = 120.0
    """The time for a bucket of weights, which goes to all servers at once."""
    start_s: float = 900.0
    """The time from the start of a process to its first answer."""


@dataclass(frozen=True, slots=True)
class ServerHealth:
    """What is known about one server's state."""

    state: ServerState = ServerState.RESTARTING
    version: int | None = None
    """The version of its weights; None while that is not certain."""
    silent: int = 0
    """The number of probes in a row that it has not answered."""
    failures: int = 0
    """The number of failures since its last completion."""
    failed_at: float = 0.0
    """The time at which the last failure was counted, on the clock of `progressed`."""
    starts: int = 0
    """The number of times that it was started again since its last completion."""
    reloads: int = 0
    """The number of times that its weights were sent again since its last completion, start, or new weights."""
    loading: bool = False
    """True while weights are being sent to it."""
    mixed: bool = False
    """True if a load broke off, so that only a new process can be loaded again."""
    tokens: float = 0.0
    """The number of tokens that it had generated when it was last asked."""
    progress_at: float | None = None
    """The time when that number last grew, or it had nothing to do. None until it was asked."""
    reason: str = ""
    """The reason why it is not healthy."""


def eligible(server: ServerHealth, current: int | None) -> bool:
    """Returns whether it may be given requests to sample from weights of version `current`."""
    return server.state is ServerState.HEALTHY and current is not None and server.version == current


def loadable(server: ServerHealth) -> bool:
    """Returns whether weights may be sent to it."""
    return server.state in (ServerState.STALE, ServerState.HEALTHY, ServerState.SUSPECT) and not server.mixed


def restartable(server: ServerHealth, limits: Limits) -> bool:
    return server.state is ServerState.DEAD and server.starts < limits.restarts


def backoff_s(server: ServerHealth, limits: Limits) -> float:
    """Returns the seconds that it must have been dead before it is started again."""
    return limits.backoff_s * 2**server.starts


def reloadable(server: ServerHealth, limits: Limits) -> bool:
    """Returns whether the current weights may be sent to it again."""
    stale = server.state is ServerState.STALE and not server.mixed and not server.loading
    return stale and server.reloads < limits.restarts


def progressed(server: ServerHealth, tokens: float, busy: bool, now: float, limits: Limits) -> ServerHealth:
    """Returns the server after it has answered that it has generated `tokens` in all.

    Args:
        busy: whether it has had requests since its last such answer.
        now: seconds of a clock that never goes back.
    """
    if tokens != server.tokens or not busy or server.progress_at is None:
        return replace(server, tokens=tokens, progress_at=now)
    if server.state in (ServerState.HEALTHY, ServerState.SUSPECT) and now - server.progress_at > limits.stuck_s:
        return _dead(server, f"no token in {now - server.progress_at:.0f} s, with requests waiting for it")
    return server


def serving(server: ServerHealth, current: int | None) -> bool:
    """Returns whether it has weights `current` and is not dead, so that it is eligible now or after a probe."""
    alive = server.state in (ServerState.HEALTHY, ServerState.SUSPECT)
    return alive and current is not None and server.version == current


def failed(server: ServerHealth, sent_at: float, now: float, limits: Limits, reason: str) -> ServerHealth:
    """Returns the server after a request, sent at `sent_at`, was not answered, or with what cannot be a completion."""
    if server.state not in (ServerState.HEALTHY, ServerState.SUSPECT):
        return server
    if server.failures and sent_at <= server.failed_at:
        return replace(server, state=ServerState.SUSPECT, reason=reason)
    failures = server.failures + 1
    if failures >= limits.failures:
        return _dead(server, f"{failures} requests one after the other failed: {reason}")
    return replace(server, state=ServerState.SUSPECT, failures=failures, failed_at=now, reason=reason)


def after(
    server: ServerHealth, event: Event, limits: Limits, *, version: int | None = None, reason: str = ""
) -> ServerHealth:
    """Returns the server after `event`. An event that cannot happen in its state changes nothing.

    Args:
        version: the version of the weights, with LOADED.
        reason: why it happened, for messages.
    """
    state = server.state
    if event is Event.EXITED:
        return replace(_dead(server, reason), mixed=False, reloads=0)
    if event is Event.STARTING:
        return ServerHealth(starts=server.starts + 1, reason=server.reason) if state is ServerState.DEAD else server
    if event is Event.STARTED:
        ready = state is ServerState.RESTARTING or (state is ServerState.DEAD and not server.mixed)
        return replace(_stale(server, server.reason), silent=0, failures=0) if ready else server
    if state is ServerState.DEAD:
        return server
    if event is Event.GIVEN_UP:
        return _dead(server, reason)
    if state is ServerState.RESTARTING:
        return server
    match event:
        case Event.LOADING if not server.mixed:
            return replace(_stale(server, "its weights are being replaced"), loading=True, reloads=0)
        case Event.RELOADING if reloadable(server, limits):
            return replace(server, loading=True, reloads=server.reloads + 1)
        case Event.LOADED if server.loading and version is not None:
            return replace(server, state=ServerState.HEALTHY, version=version, loading=False, failures=0, reason="")
        case Event.LOAD_BROKE_OFF:
            return replace(_dead(server, reason), mixed=True)
        case Event.OTHER_VERSION:
            return replace(_stale(server, reason), reloads=limits.restarts)  # somebody else's server by now
        case Event.ANSWERED:
            recovered = ServerState.HEALTHY if state is ServerState.SUSPECT else state
            return replace(server, state=recovered, silent=0)
        case Event.SILENT:
            silent = server.silent + 1
            if silent >= limits.silent_probes:
                return _dead(server, f"{silent} probes one after the other were not answered: {reason}")
            doubted = ServerState.SUSPECT if state is ServerState.HEALTHY else state
            return replace(server, state=doubted, silent=silent, reason=reason)
        case Event.SERVED:
            return replace(server, failures=0, starts=0, reloads=0)
    return server


def _stale(server: ServerHealth, reason: str) -> ServerHealth:
    return replace(server, state=ServerState.STALE, version=None, loading=False, reason=reason)


def _dead(server: ServerHealth, reason: str) -> ServerHealth:
    return replace(_stale(server, reason), state=ServerState.DEAD, silent=0, failures=0)

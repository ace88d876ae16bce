"""The servers' state machine, in every order that events can have."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Self

import pytest

from lens_megatron.rollout.servers import health
from lens_megatron.rollout.servers.health import Event, Limits, ServerHealth, ServerState

LIMITS = Limits()
CURRENT = 7

DOUBT = {Event.EXITED, Event.LOAD_BROKE_OFF, Event.OTHER_VERSION, Event.GIVEN_UP}
"""After any of these nobody can know that the weights are those of before."""


@dataclass(frozen=True)
class Truth:
    """What the events so far allow to be known of a server's weights, whatever its state."""

    being_sent: bool = False
    version: int | None = None

    def after(self, event: Event, version: int | None) -> Self:
        if event in (Event.LOADING, Event.RELOADING):
            return Truth(being_sent=True)
        if event is Event.LOADED:
            return Truth(version=version) if self.being_sent else self
        return Truth() if event in DOUBT else self


def next_states(server: ServerHealth) -> Iterator[tuple[Event | None, int | None, ServerHealth]]:
    """All that can happen to a server. Reasons are left out: they would make equal states different."""
    for event in Event:
        if event is Event.STARTING and not health.restartable(server, LIMITS):
            continue
        if event is Event.RELOADING and not health.reloadable(server, LIMITS):
            continue
        for version in (CURRENT - 1, CURRENT) if event is Event.LOADED else (None,):
            yield event, version, replace(health.after(server, event, LIMITS, version=version), reason="")
    yield None, None, replace(health.failed(server, 1.0, 0.0, LIMITS, ""), reason="")
    yield None, None, replace(health.progressed(server, server.tokens, True, 1e9, LIMITS), reason="")


def reachable() -> Iterator[tuple[ServerHealth, Truth, Event | None, ServerHealth, Truth]]:
    """Every step that any sequence of events can lead to."""
    seen = {(ServerHealth(), Truth())}
    todo = [*seen]
    while todo:
        server, truth = todo.pop()
        for event, version, after in next_states(server):
            known = truth.after(event, version) if event else truth
            yield server, truth, event, after, known
            if (after, known) not in seen:
                seen.add((after, known))
                todo.append((after, known))


def test_in_no_sequence_of_events_does_a_server_sample_with_weights_that_may_be_others():
    steps, eligible = 0, set()
    for _, _, _, server, truth in reachable():
        steps += 1
        for version in (CURRENT - 1, CURRENT):
            if health.serving(server, version) or health.eligible(server, version):
                assert truth.version == version, (server, truth)
        if health.eligible(server, CURRENT):
            eligible.add(server)
    assert steps > 1000 and len(eligible) > 5


def test_what_always_holds():
    for before, _, event, server, _ in reachable():
        assert (server.version is None) == (server.state not in (ServerState.HEALTHY, ServerState.SUSPECT))
        assert not (server.mixed and health.loadable(server)) and not (server.mixed and server.version is not None)
        if before.state is ServerState.DEAD and server.state is not ServerState.DEAD:
            assert event in (Event.STARTING, Event.STARTED)
        if health.eligible(server, CURRENT):
            assert health.serving(server, CURRENT) and health.loadable(server)
        if health.loadable(server):  # weights are all that it takes
            loaded = health.after(health.after(server, Event.LOADING, LIMITS), Event.LOADED, LIMITS, version=CURRENT)
            assert health.eligible(loaded, CURRENT)


def healthy() -> ServerHealth:
    server = ServerHealth()
    for event in (Event.STARTED, Event.LOADING, Event.LOADED):
        server = health.after(server, event, LIMITS, version=CURRENT)
    assert health.eligible(server, CURRENT) and not health.eligible(server, CURRENT + 1)
    return server


def test_silence_makes_suspect_and_then_dead_and_an_answer_forgives():
    server = health.after(healthy(), Event.SILENT, LIMITS, reason="timeout")
    assert (
        server.state is ServerState.SUSPECT and health.serving(server, CURRENT) and not health.eligible(server, CURRENT)
    )
    assert health.after(server, Event.ANSWERED, LIMITS) == healthy_again(server)
    server = health.after(health.after(server, Event.SILENT, LIMITS), Event.SILENT, LIMITS, reason="timeout")
    assert server.state is ServerState.DEAD and "3 probes" in server.reason and "timeout" in server.reason


def healthy_again(server: ServerHealth) -> ServerHealth:
    return replace(server, state=ServerState.HEALTHY, silent=0)


def test_failures_count_once_for_requests_that_were_under_way_together():
    server = healthy()
    for _ in range(64):
        server = health.failed(server, sent_at=1.0, now=5.0, limits=LIMITS, reason="reset")
    assert server.state is ServerState.SUSPECT and server.failures == 1
    for sent in (6.0, 8.0):
        server = health.after(server, Event.ANSWERED, LIMITS)
        server = health.failed(server, sent_at=sent, now=sent + 1, limits=LIMITS, reason="garbage")
    assert server.state is ServerState.DEAD and "garbage" in server.reason


def test_a_completion_forgives_failures():
    server = healthy()
    for sent in range(1, 20, 2):
        server = health.failed(server, float(sent), sent + 1.0, LIMITS, "reset")
        server = health.after(health.after(server, Event.ANSWERED, LIMITS), Event.SERVED, LIMITS)
    assert health.eligible(server, CURRENT)


def test_no_token_for_long_with_requests_waiting_is_death():
    server = health.progressed(healthy(), 10.0, False, 100.0, LIMITS)
    idle = health.progressed(server, 10.0, False, 9999.0, LIMITS)
    assert health.eligible(idle, CURRENT)
    slow = health.progressed(health.progressed(server, 10.0, True, 219.0, LIMITS), 11.0, True, 221.0, LIMITS)
    assert health.eligible(slow, CURRENT) and slow.progress_at == 221.0
    stuck = health.progressed(server, 10.0, True, 221.0, LIMITS)
    assert stuck.state is ServerState.DEAD and "no token in 121 s" in stuck.reason


def test_restarts_are_limited_until_it_has_served_again():
    server = healthy()
    for _ in range(LIMITS.restarts):
        server = health.after(server, Event.EXITED, LIMITS)
        assert health.restartable(server, LIMITS)
        server = health.after(health.after(server, Event.STARTING, LIMITS), Event.STARTED, LIMITS)
        assert server.state is ServerState.STALE and not health.serving(server, CURRENT)
    dead = health.after(server, Event.EXITED, LIMITS)
    assert not health.restartable(dead, LIMITS)
    served = health.after(health.after(server, Event.LOADING, LIMITS), Event.LOADED, LIMITS, version=CURRENT)
    served = health.after(served, Event.SERVED, LIMITS)
    assert health.restartable(health.after(served, Event.EXITED, LIMITS), LIMITS)


def test_each_restart_in_a_row_waits_twice_as_long():
    server, waits = healthy(), []
    for _ in range(LIMITS.restarts):
        server = health.after(server, Event.EXITED, LIMITS)
        waits.append(health.backoff_s(server, LIMITS))
        server = health.after(health.after(server, Event.STARTING, LIMITS), Event.STARTED, LIMITS)
    assert waits == [1.0, 2.0, 4.0]


def test_the_current_weights_are_given_again_after_a_start_but_not_to_a_server_that_has_others():
    started = health.after(ServerHealth(), Event.STARTED, LIMITS)
    assert health.reloadable(started, LIMITS) and not health.reloadable(healthy(), LIMITS)
    for _ in range(LIMITS.restarts):
        loading = health.after(started, Event.RELOADING, LIMITS)
        assert loading.loading and not health.reloadable(loading, LIMITS)
        started = replace(loading, loading=False)
    assert not health.reloadable(started, LIMITS)
    taken = health.after(healthy(), Event.OTHER_VERSION, LIMITS, reason="another trainer's")
    assert taken.state is ServerState.STALE and not health.reloadable(taken, LIMITS) and health.loadable(taken)


@pytest.mark.parametrize("event", [Event.STARTED, Event.ANSWERED, Event.LOADING, Event.RELOADING])
def test_a_server_with_parts_of_two_models_needs_a_new_process(event: Event):
    server = health.after(health.after(healthy(), Event.LOADING, LIMITS), Event.LOAD_BROKE_OFF, LIMITS, reason="cut")
    assert server.state is ServerState.DEAD and health.after(server, event, LIMITS) == server
    fresh = health.after(health.after(server, Event.EXITED, LIMITS), Event.STARTED, LIMITS)
    assert health.loadable(fresh)


def test_a_server_that_was_never_asked_is_not_stuck():
    """It may get requests before its first probe; a clock may count from the machine's start."""
    fresh = health.progressed(healthy(), 0.0, True, 41_709.0, LIMITS)
    assert health.eligible(fresh, CURRENT) and fresh.progress_at == 41_709.0

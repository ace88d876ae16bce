"""Engines that share their work: real engines on threads, one rank each, and torch's own store between them."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import pytest
import torch
from records import step_prompts
from test_scheduler import Nothing, Verdicts
from test_streaming import GROUP, PROMPTS, PURIFIED, drawn, log_probs, odd
from toy_runs import Toy
from transformers import AutoModelForCausalLM

from lens_megatron.config import LensConfig, RolloutConfig
from lens_megatron.results import CollectedGroups, SamplingStats
from lens_megatron.rollout import request_store as messages
from lens_megatron.rollout.engine import Completion, EnginesLostError, Request
from lens_megatron.rollout.local import LocalEngine
from lens_megatron.rollout.queue import SharedQueue
from lens_megatron.rollout.request_store import RequestBatch, RequestStore
from lens_megatron.rollout.scheduler import RolloutScheduler
from lens_megatron.supervision import channel, control_store
from lens_megatron.supervision.control_store import ControlStore, Storage
from lens_megatron.types import Group

ASKED = step_prompts(PROMPTS, PURIFIED)
WORLD = 3
ROLLOUT = RolloutConfig(prompts_per_step=6, rollouts_per_prompt=GROUP, max_response_length=40)


@dataclass(frozen=True)
class Store:
    connection: ControlStore
    storage: Storage


class Mortal(LocalEngine):
    """Can lose its servers, as an engine in another process can; and writes down what it is given."""

    def __init__(self, model: str):
        super().__init__(model, max_running_sequences=64)
        self.alive, self.lost, self.served, self.dies_after, self.pace = True, [], [], None, 0.0
        self.returns = False
        """Dead, it is being started again."""
        self.may_step = lambda: True
        """A step waits until this is true, so that a test decides who is faster."""

    def capacity(self) -> int:
        return super().capacity() if self.alive else 0

    def hopeless(self) -> bool:
        return not (self.alive or self.returns)

    def submit(self, requests: Sequence[Request]) -> None:
        requests = list(requests)
        self.served += [request.request_id for request in requests]
        super().submit(requests)

    def step(self) -> list[Completion]:
        time.sleep(self.pace)
        while not self.may_step():
            time.sleep(0.001)
        if self.dies_after == 0:
            self.alive, self.lost = False, [s.request for s in (*self.running, *self.waiting)]
            self.close()
            self.dies_after = None
            return []
        if self.dies_after is not None:
            self.dies_after -= 1
        return super().step()

    def returned(self) -> list[Request]:
        lost, self.lost = self.lost, []
        return lost


@pytest.fixture(scope="module")
def engines(toy: Toy) -> list[Mortal]:
    torch.manual_seed(1)
    weights = [(name, p.data) for name, p in AutoModelForCausalLM.from_pretrained(toy.model).named_parameters()]
    engines = [Mortal(str(toy.model)) for _ in range(WORLD)]
    for engine in engines:
        engine.load_weights(iter(weights), 3)
        engine.eos = torch.arange(10, 20)
    return engines


@pytest.fixture(scope="module")
def store() -> Iterator[Store]:
    secret, listener = channel.new_secret(), channel.listen(["127.0.0.1", 0])
    door, storage = control_store.serve(listener, secret)
    yield Store(ControlStore(channel.address_of(listener), secret), storage)
    door.close()


def make_boards(store: Store) -> list[RequestStore]:
    store.storage.values.clear()
    return [RequestStore(store.connection.clone(), rank, WORLD) for rank in range(WORLD)]


def on_every_rank(work: Callable[[int], object]) -> list:
    """Raises the first error of any rank."""
    with ThreadPoolExecutor(WORLD) as pool:
        return [future.result(timeout=120) for future in [pool.submit(work, rank) for rank in range(WORLD)]]


def sample(
    engines: Sequence[Mortal],
    boards: Sequence[RequestStore],
    shares: Sequence[Sequence[int]],
    rule: Callable[[str], bool] = odd,
    schedule: str = "streamed",
) -> tuple[dict[int, Group], list[SamplingStats]]:
    """Groups by prompt; shares: places of the prompts of each rank."""
    for engine in engines:
        engine.served, engine.alive = [], True
    rollout = ROLLOUT.model_copy(update={"schedule": schedule})
    samplers = [
        RolloutScheduler(
            engine, Verdicts(rule), lambda ids: str(list(ids)), rollout, LensConfig(), 11, Nothing(), request_store
        )
        for engine, request_store in zip(engines, boards, strict=True)
    ]

    def work(rank: int) -> CollectedGroups:
        return samplers[rank].sample([ASKED[place] for place in shares[rank]], step=2, version=3)

    collected = on_every_rank(work)
    return {group.prompt.index: group for own in collected for group in own.groups}, [own.stats for own in collected]


@pytest.fixture(scope="module")
def alone(engines: list[Mortal]) -> dict[int, Group]:
    """What one engine draws for all prompts."""
    scheduler = RolloutScheduler(
        engines[0], Verdicts(odd), lambda ids: str(list(ids)), ROLLOUT, LensConfig(), 11, Nothing()
    )
    return {group.prompt.index: group for group in scheduler.sample(ASKED, step=2, version=3).groups}


def same(found: dict[int, Group], expected: dict[int, Group]) -> None:
    assert found.keys() == expected.keys()
    found, expected = ([groups[i] for i in sorted(groups)] for groups in (found, expected))
    assert drawn(found) == drawn(expected)
    torch.testing.assert_close(log_probs(found), log_probs(expected), atol=1e-4, rtol=0)


@pytest.mark.parametrize("schedule", ["streamed", "speculative", "sequential"])
def test_who_serves_a_request_does_not_change_what_is_drawn(engines, store, alone, schedule: str):
    """Twice with the same boards: a phase leaves nothing behind that the next would take for its own."""
    boards = make_boards(store)
    for shares in ([[0, 1, 2, 3, 4, 5], [], []], [[5], [0, 2, 4], [1, 3]]):
        groups, _ = sample(engines, boards, shares, schedule=schedule)
        same(groups, alone)
        assert all(not engine.running and not engine.waiting for engine in engines)


def test_idle_engines_take_over(engines, store, monkeypatch: pytest.MonkeyPatch):
    """All prompts are one rank's, and it is slow: the others serve most of them, and second waves too.

    Each engine has room for two of the six first waves and waits until all have work; the slow one computes only while
    the others have nothing to do.
    """
    others = engines[1:]
    for engine in engines:
        monkeypatch.setattr(engine, "max_running_sequences", 2 * GROUP)
        monkeypatch.setattr(engine, "may_step", lambda: all(other.served for other in engines))
    monkeypatch.setattr(
        engines[0],
        "may_step",
        lambda: all(e.served for e in others) and not any(e.running or e.waiting for e in others),
    )
    monkeypatch.setattr(engines[0], "pace", 0.05)
    groups, stats = sample(engines, make_boards(store), [[0, 1, 2, 3, 4, 5], [], []], lambda text: False)
    served = [len(engine.served) for engine in engines]
    assert sum(served) == len({i for engine in engines for i in engine.served}) == 6 * GROUP + 4 * GROUP
    assert min(served[1:]) >= 2 * GROUP and sum(served[1:]) > sum(served) / 2
    assert any(number >= 6 * GROUP * WORLD for engine in others for number in engine.served), "second waves"
    assert all(own.engine_seconds > 0 for own in stats)


def test_equal_shares_stay_where_they_are_while_everyone_is_busy(engines, store):
    """Nobody takes what its owner would start at once."""
    barrier = threading.Barrier(WORLD)
    boards = make_boards(store)
    queues = [None] * WORLD

    def work(rank: int) -> None:
        queue = queues[rank] = SharedQueue(engines[rank], boards[rank])
        engines[rank].served = []
        for part in range(2):
            ids = [rank + WORLD * (part * 4 + i) for i in range(4)]
            queue.add([Request(i, (5, 6, 7), 30, 1.0, i) for i in ids], urgent=False, expected_length=1.0)
        barrier.wait()
        ended = []
        while len(ended) < 8:
            ended += queue.step()
        queue.finish()

    on_every_rank(work)
    assert [sorted({i % WORLD for i in engine.served}) for engine in engines] == [[0], [1], [2]]


def test_a_lost_engines_work_is_done_by_the_others(engines, store, alone):
    engines[1].dies_after = 3
    groups, _ = sample(engines, make_boards(store), [[0, 1], [2, 3], [4, 5]])
    same(groups, alone)
    assert not engines[1].alive and engines[1].served
    handed_on = set(engines[1].served) & {i for engine in engines[:1] + engines[2:] for i in engine.served}
    assert handed_on, "nothing was under way when it died"


def test_without_any_engine_every_rank_says_so(engines, store):
    for engine in engines:
        engine.dies_after = 2
    with pytest.raises(EnginesLostError, match="no engine of any rank is left for [0-9]+ requests"):
        sample(engines, make_boards(store), [[0, 1], [2, 3], [4, 5]])
    for engine in engines:
        engine.alive = True


def test_when_no_engine_serves_requests_wait_for_those_that_are_started_again(engines, store, alone):
    for engine in engines:
        engine.dies_after, engine.returns = 2, True

    def start_again() -> None:
        while any(engine.alive for engine in engines):
            time.sleep(0.01)
        time.sleep(0.5)
        engines[1].alive = True

    starter = threading.Thread(target=start_again)
    starter.start()
    groups, _ = sample(engines, make_boards(store), [[0, 1], [2, 3], [4, 5]])
    starter.join()
    for engine in engines:
        engine.alive, engine.returns, engine.dies_after = True, False, None
    same(groups, alone)


def test_what_is_taken_back_never_comes(engines, store):
    """Speculative waves of prompts that are not hard: withdrawn wherever they run, and their tokens are counted."""
    groups, stats = sample(
        engines, make_boards(store), [[0, 1, 2, 3, 4, 5], [], []], lambda text: True, schedule="speculative"
    )
    assert not any(group.rescue for group in groups.values())
    assert sum(own.discarded_tokens for own in stats) > 0
    assert all(not engine.running and not engine.waiting for engine in engines)


def test_an_engine_stops_what_another_rank_takes_back(engines, store):
    """Rank 0 has no engine, so others run its eight requests, of 100 tokens each; all but the last are taken back."""
    boards, before = make_boards(store), [engine.generated for engine in engines]
    started = threading.Event()

    def work(rank: int) -> list[Completion]:
        queue, ended = SharedQueue(engines[rank], boards[rank]), []
        ids = range(0, 8 * WORLD, WORLD)
        if rank == 0:
            queue.add([Request(i, (5, 6, 7), 100, 1.0, i) for i in ids], urgent=False, expected_length=1.0)
        while not started.is_set():
            queue.step()
            if queue.claimed.running:
                started.set()
        if rank == 0:
            queue.cancel(ids[:-1])
            while not ended:
                ended += queue.step()
        queue.finish()
        return ended

    for rank, engine in enumerate(engines):
        engine.alive, engine.pace, engine.eos = rank > 0, 0.01, torch.tensor([-1])
    ended, _, _ = on_every_rank(work)
    for engine in engines:
        engine.alive, engine.pace, engine.eos = True, 0.0, torch.arange(10, 20)
    assert [(completion.request_id, len(completion.token_ids)) for completion in ended] == [(7 * WORLD, 100)]
    assert 100 <= sum(engine.generated - old for engine, old in zip(engines, before, strict=True)) < 400


def test_a_batch_is_read_as_it_was_and_holds_its_prompt_once():
    requests = tuple(Request(7 * i, (3, 1, 4), 5, 0.7, 2**62 + i) for i in range(2))
    batch = RequestBatch(requests, urgent=True, expected_length=2.5)
    assert messages._read_batch(messages._batch_bytes(batch)) == batch
    longer = RequestBatch((*requests, replace(requests[0], request_id=8)), urgent=True, expected_length=2.5)
    assert len(messages._batch_bytes(longer)) - len(messages._batch_bytes(batch)) == 8 * 8 + 1, "no prompt"
    with pytest.raises(ValueError, match="share a prompt"):
        messages._batch_bytes(replace(batch, requests=(requests[0], replace(requests[1], prompt=(9,)))))


def test_keys_of_phases_gone_by_are_deleted(engines, store):
    boards = make_boards(store)
    counts = []
    for _ in range(4):
        sample(engines, boards, [[0, 1], [2, 3], [4, 5]])
        counts.append(len(store.storage.values))
    assert counts[3] - counts[2] < 30, counts

"""A step that rejects groups trains on the first candidates that pass, whatever is sampled first. Simulated engine."""

import random
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from test_scheduler import Nothing, Verdicts

from lens_megatron.algorithms import rescue
from lens_megatron.config import LensConfig, RolloutConfig
from lens_megatron.rollout.engine import Completion, EngineProgress, Request
from lens_megatron.rollout.refill import NO_REFILL, OwnRefill, SharedRefill
from lens_megatron.rollout.request_store import RequestStore
from lens_megatron.rollout.scheduler import GroupStore, RolloutScheduler
from lens_megatron.rollout.unfinished import UnfinishedGroups
from lens_megatron.supervision import channel, control_store
from lens_megatron.supervision.control_store import ControlStore
from lens_megatron.types import Group, Prompt, PurifiedPrompt, StepPrompt

STEP, SEED, SIZE = 2, 11, 4
SCHEDULES = ("speculative", "streamed", "sequential")


@dataclass
class Dice:
    """An engine whose completions are functions of their seeds: 1 to 12 tokens, of which the first is the verdict.

    A prompt (p, ...) is solved with probability p / 10.
    """

    places: int
    left: dict[int, int] = field(default_factory=dict)
    """Tokens that are still to come, by request."""
    whole: dict[int, Completion] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)
    """One word for every request and every step, in order."""

    def submit(self, requests: Iterable[Request]) -> None:
        for request in requests:
            dice = random.Random(request.seed)
            tokens = (int(dice.random() < request.prompt[0] / 10), *range(dice.randrange(12)))
            self.left[request.request_id] = len(tokens)
            self.whole[request.request_id] = Completion(request.request_id, tokens, (-1.0,) * len(tokens), True, 3)
            self.log.append("native" if len(request.prompt) == 3 else "purified")

    def step(self) -> list[Completion]:
        self.log.append("step")
        self.left = {number: tokens - 1 for number, tokens in self.left.items()}
        ended = [number for number, tokens in self.left.items() if not tokens]
        for number in ended:
            del self.left[number]
        return [self.whole.pop(number) for number in ended]

    def cancel(self, request_ids: Collection[int]) -> int:
        here = self.left.keys() & set(request_ids)
        return sum(len(self.whole.pop(number).token_ids) - self.left.pop(number) for number in here)

    def returned(self) -> list[Request]:
        return []

    def capacity(self) -> int:
        return self.places

    def hopeless(self) -> bool:
        return False

    def progress(self) -> EngineProgress:
        return EngineProgress(0, len(self.left), 0)


@dataclass(frozen=True)
class Case:
    candidates: tuple[StepPrompt, ...]
    wanted: int
    lens: LensConfig
    schedule: str
    capacities: tuple[int, ...]
    """One per rank."""

    def keep(self, group: Group) -> bool:
        """Groups whose rollouts do not all have one reward, after the merge of the second wave."""
        return len({r.reward for r in rescue.merge(group, self.lens, run_seed=SEED, step=STEP).rollouts}) > 1

    def scheduler(self, rank: int, store: GroupStore, board: RequestStore | None = None) -> RolloutScheduler:
        rollout = RolloutConfig(rollouts_per_prompt=SIZE, max_response_length=12, schedule=self.schedule)
        return RolloutScheduler(
            Dice(self.capacities[rank]),
            Verdicts(lambda text: text == "1"),
            lambda ids: str(ids[0]),
            rollout,
            self.lens,
            SEED,
            store,
            board,
        )

    def all_groups(self) -> list[Group]:
        """Those of every candidate: what the ones that are sampled must be equal to."""
        return self.scheduler(0, Nothing()).sample(self.candidates, STEP, 3).groups

    def expected(self) -> tuple[list[Group], list[Group]]:
        """All groups up to the last one that is wanted, and those of them that pass."""
        groups = self.all_groups()
        passing = [group.place for group in groups if self.keep(group)][: self.wanted]
        end = passing[-1] + 1 if len(passing) == self.wanted else len(groups)
        return groups[:end], [group for group in groups if group.place in passing]


def make_case(number: int, ranks: int = 1) -> Case:
    dice = random.Random(number)
    wanted = dice.randint(1, 6)
    count = wanted * dice.randint(1, 4)
    ways = dice.choice([(0, 10), (0, 1, 9, 10), (0, 10, 10, 5), tuple(range(11))])
    candidates = []
    for place in range(count):
        row = dice.randrange(1, 4) if dice.random() < 0.3 else 4 + place  # some rows come more than once
        prompt = _prompt(row, dice.choice(ways), dice.choice(ways))
        purified = PurifiedPrompt(prompt.token_ids[1:], (0,), (0.0,) * 3) if dice.random() < 0.7 else None
        candidates.append(StepPrompt(place, prompt, purified))
    return Case(
        tuple(candidates),
        wanted,
        LensConfig(enabled=dice.random() < 0.8, tau=dice.choice([0.3, 0.5, 1.0])),
        dice.choice(SCHEDULES),
        tuple(dice.choice([1, 3, 8, 64]) for _ in range(ranks)),
    )


def _prompt(row: int, *ways: int) -> Prompt:
    return Prompt(row, (*ways, row), (True,) * 3, "1", "p", "toy")


def kept(case: Case, groups: Sequence[Group]) -> list[Group]:
    return [group for group in groups if case.keep(group)]


def test_one_engine_keeps_the_first_candidates_that_pass():
    short = rejected = rescued = 0
    for number in range(300):
        case = make_case(number)
        started, passing = case.expected()
        groups = case.scheduler(0, Nothing()).sample(
            case.candidates, STEP, 3, keep=case.keep, refill=OwnRefill(case.wanted)
        )
        assert groups.groups == started and kept(case, groups.groups) == passing, f"case {number}"
        short += len(passing) < case.wanted
        rejected += len(started) > len(passing)
        rescued += any(group.rescue for group in passing)
    assert min(short, rejected, rescued) > 30, "the cases show too little"


@pytest.fixture(scope="module")
def control() -> Iterator[ControlStore]:
    secret, listener = channel.new_secret(), channel.listen(["127.0.0.1", 0])
    door, _ = control_store.serve(listener, secret)
    yield ControlStore(channel.address_of(listener), secret)
    door.close()


def sample_on(case: Case, control: ControlStore, step: int, boards: Sequence[RequestStore | None]) -> list[Group]:
    """The groups of all ranks by place, each sampled by the rank that the program gives it to."""
    ranks = len(case.capacities)

    def work(rank: int) -> list[Group]:
        refill = SharedRefill(control.clone(), step, case.wanted, len(case.candidates))
        sampler = case.scheduler(rank, Nothing(), boards[rank])
        return sampler.sample(case.candidates[rank::ranks], STEP, 3, keep=case.keep, refill=refill).groups

    with ThreadPoolExecutor(ranks) as pool:
        parts = [future.result(timeout=120) for future in [pool.submit(work, rank) for rank in range(ranks)]]
    assert all(group.place % ranks == rank for rank, part in enumerate(parts) for group in part)
    return sorted((group for part in parts for group in part), key=lambda group: group.place)


@pytest.mark.parametrize("shared", [False, True], ids=["own_queue", "shared_queue"])
@pytest.mark.parametrize("ranks", [2, 3])
def test_several_engines_keep_the_first_candidates_that_pass(control: ControlStore, ranks: int, shared: bool):
    """Steps follow one another on the same stores, as in a run: none takes the counts of another for its own."""
    offset = 1000 * ranks + 500 * shared
    boards = [RequestStore(control.clone(), rank, ranks) if shared else None for rank in range(ranks)]
    for board in filter(None, boards):
        board.phase = offset  # the tests share one store
    for number in range(25):
        case = make_case(offset + number, ranks)
        groups = sample_on(case, control, offset + number, boards)
        started, passing = case.expected()
        assert groups == started and kept(case, groups) == passing, f"case {offset + number}"
    last = [f"refill/{offset + 24}/{name}" for name in ("kept", "rejected")]
    before = [f"refill/{offset + 23}/{name}" for name in ("kept", "rejected")]
    assert control.get(before) == [None, None] != control.get(last), "counts of steps that are done go away"


def test_layout_and_schedule_do_not_decide_what_is_kept(control: ControlStore):
    case = make_case(7, 2)
    assert len(case.expected()[0]) > case.wanted
    for step, schedule in enumerate(SCHEDULES, 10_000):
        variant = replace(case, schedule=schedule)
        assert sample_on(variant, control, step, [None, None]) == case.expected()[0]


def test_where_nothing_is_rejected_everything_starts_at_once():
    case = replace(make_case(3), capacities=(1000,), lens=LensConfig(enabled=False))
    sampler = case.scheduler(0, Nothing())
    assert sampler.sample(case.candidates, STEP, 3).groups == case.all_groups()
    assert sampler.engine.log.count("step") <= 12
    assert "step" not in sampler.engine.log[: SIZE * len(case.candidates)] and NO_REFILL.is_over()


def test_a_row_that_is_a_candidate_twice_is_drawn_twice():
    twice = tuple(StepPrompt(place, _prompt(1, 5, 5), None) for place in range(6))
    case = Case(twice, 2, LensConfig(), "speculative", (8,))
    groups = case.all_groups()
    assert len({group.native for group in groups}) == 6 and [group.place for group in groups] == [0, 1, 2, 3, 4, 5]
    refilled = case.scheduler(0, Nothing()).sample(
        twice, STEP, 3, keep=lambda group: group.place > 2, refill=OwnRefill(2)
    )
    assert refilled.groups == groups[:5]


class Interrupted(Exception):
    pass


@dataclass
class Dying:
    """Keeps groups as a run does, and ends the sampling before the group after the last."""

    kept: UnfinishedGroups
    left: int

    def read(self, step: int, prompts: Sequence[StepPrompt], version: int) -> dict[int, Group]:
        return self.kept.read(step, prompts, version)

    def append(self, step: int, place: int, group: Group) -> None:
        if not self.left:
            raise Interrupted
        self.left -= 1
        self.kept.append(step, place, group)


def test_rejected_groups_of_an_interrupted_attempt_count(tmp_path: Path):
    """Whenever it is killed, the next attempt ends with the same groups, and draws none of them again."""
    case = next(c for c in map(make_case, range(100)) if len(c.expected()[0]) > c.wanted + 3 and c.wanted > 2)
    started, _ = case.expected()
    for done in range(len(started)):
        folder = tmp_path / str(done)
        dying = Dying(UnfinishedGroups(folder, 0, 1), done)
        with pytest.raises(Interrupted):
            case.scheduler(0, dying).sample(case.candidates, STEP, 3, keep=case.keep, refill=OwnRefill(case.wanted))
        sampler = case.scheduler(0, UnfinishedGroups(folder, 0, 1))
        again = sampler.sample(case.candidates, STEP, 3, keep=case.keep, refill=OwnRefill(case.wanted))
        assert again.groups == started
        assert sampler.engine.log.count("native") == SIZE * (len(started) - done)


def test_a_rejection_is_on_disk_before_others_hear_of_it(control: ControlStore, tmp_path: Path):
    """Else another rank could keep a group that was started for one which a resumed attempt lacks."""
    case = make_case(1)
    refill = SharedRefill(control, 20_000, case.wanted, len(case.candidates))
    with pytest.raises(Interrupted):
        case.scheduler(0, Dying(UnfinishedGroups(tmp_path, 0, 1), 0)).sample(
            case.candidates, STEP, 3, keep=case.keep, refill=refill
        )
    assert control.get(refill.names) == [None, None]


def test_a_group_that_was_kept_on_disk_waits_for_its_turn(tmp_path: Path):
    """Its attempt had started it for rejections that are lost, as on a disk without room. Now none may reach so far."""
    case = next(c for c in map(make_case, range(100)) if 1 < len(c.expected()[0]) < len(c.candidates) - 1)
    started, passing = case.expected()
    last = case.all_groups()[-1]
    UnfinishedGroups(tmp_path, 0, 1).append(STEP, last.place, last)
    groups = case.scheduler(0, UnfinishedGroups(tmp_path, 0, 1)).sample(
        case.candidates, STEP, 3, keep=case.keep, refill=OwnRefill(case.wanted)
    )
    assert groups.groups == started and kept(case, groups.groups) == passing

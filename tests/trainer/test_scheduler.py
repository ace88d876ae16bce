"""Two waves through the real engine, with a grader of known verdicts and of any speed."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from records import step_prompts
from toy_runs import Toy
from transformers import AutoModelForCausalLM

from lens_megatron.config import LensConfig, RolloutConfig
from lens_megatron.records import between_ranks
from lens_megatron.reward import AnswerFacts, Grade, GradeStatus
from lens_megatron.rollout import replay
from lens_megatron.rollout.local import LocalEngine
from lens_megatron.rollout.scheduler import GroupStore, RolloutScheduler
from lens_megatron.rollout.unfinished import UnfinishedGroups
from lens_megatron.types import Group, Origin, Prompt, PurifiedPrompt, StepPrompt


class Verdicts:
    """Pays by a rule; remembers when it was asked."""

    def __init__(self, rule: Callable[[str], bool]):
        self.rule, self.grades = rule, []

    def submit(self, completion: str, answer: str, *, facts: AnswerFacts | None = None) -> int:
        status = GradeStatus.CORRECT if self.rule(completion) else GradeStatus.WRONG
        self.grades.append(Grade(status, float(self.rule(completion)), 0.0))
        return len(self.grades) - 1

    def wait(self, tickets: Sequence[int]) -> dict[int, Grade]:
        return {ticket: self.grades[ticket] for ticket in tickets}


@pytest.fixture(scope="module")
def engine(toy: Toy) -> LocalEngine:
    engine = LocalEngine(str(toy.model), max_running_sequences=5)
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(toy.model)
    engine.load_weights([(name, parameter.data) for name, parameter in model.named_parameters()], 3)
    return engine


PROMPTS = [Prompt(i, (5 + i, 6, 7, 8), (False, True, True, True), "1", "p", "toy") for i in range(3)]
PURIFIED = [PurifiedPrompt((5, 7, 8), (1,), (0.0, 1.0, 0.5, 0.1)), None, PurifiedPrompt((7, 6, 8), (2,), (0.0,) * 4)]


class Nothing:
    """Keeps no groups."""

    def read(self, step: int, prompts: Sequence[StepPrompt], version: int) -> dict[int, Group]:
        return {}

    def append(self, step: int, place: int, group: Group) -> None:
        pass


def sample(
    engine: LocalEngine,
    rule: Callable[[str], bool],
    store: GroupStore | None = None,
    schedule: str = "speculative",
    asked: Sequence[StepPrompt] = tuple(step_prompts(PROMPTS, PURIFIED)),
    **lens: object,
) -> list[Group]:
    store = store or Nothing()
    rollout = RolloutConfig(prompts_per_step=3, rollouts_per_prompt=4, max_response_length=6, schedule=schedule)
    scheduler = RolloutScheduler(
        engine, Verdicts(rule), lambda ids: str(list(ids)), rollout, LensConfig(**lens), 11, store
    )
    return scheduler.sample(asked, step=2, version=3).groups


def test_hard_groups_with_a_purified_prompt_get_a_second_wave(engine: LocalEngine):
    groups = sample(engine, lambda text: False)
    assert [len(g.rescue) for g in groups] == [4, 0, 4]
    assert [g.prompt.index for g in groups] == [0, 1, 2]
    for group in groups:
        assert len(group.native) == 4 and {r.weight_version for r in group.native} == {3}
        assert {r.origin for r in group.rescue} <= {Origin.PURIFIED}
    assert [len(g.rescue) for g in sample(engine, lambda text: True)] == [0, 0, 0]
    assert [len(g.rescue) for g in sample(engine, lambda text: False, enabled=False)] == [0, 0, 0]


def test_samples_differ_within_a_group_and_repeat_between_runs(engine: LocalEngine):
    first, second = (sample(engine, lambda text: len(text) % 2 == 0) for _ in range(2))
    assert first == second
    assert all(len({r.token_ids for r in g.native}) > 1 for g in first)


def test_a_prompt_that_stands_twice_in_a_step_draws_twice(engine: LocalEngine):
    """Where two epochs meet. And what is drawn at a place does not depend on which places the rank has."""
    twice = step_prompts([PROMPTS[0], PROMPTS[1], PROMPTS[0]], [PURIFIED[0], None, PURIFIED[0]])
    first, _, second = sample(engine, lambda text: False, asked=twice)
    assert first.prompt == second.prompt and first.native != second.native and first.rescue != second.rescue
    (alone,) = sample(engine, lambda text: False, asked=twice[2:])
    for wave in ("native", "rescue"):
        assert [r.token_ids for r in getattr(alone, wave)] == [r.token_ids for r in getattr(second, wave)]


def test_groups_kept_by_an_interrupted_attempt_are_not_sampled_again(engine: LocalEngine, tmp_path: Path):
    def even(text: str) -> bool:
        return len(text) % 2 == 0

    # Under the streamed schedule no token is sampled for nothing, so that tokens can be counted.
    whole = sample(engine, even, UnfinishedGroups(tmp_path, 0, 1), "streamed")
    (path,) = tmp_path.iterdir()
    lines = path.read_text().split("\n")
    path.write_text("\n".join(lines[:2]) + "\n" + lines[2][:-20])
    before = engine.generated
    again = sample(engine, even, UnfinishedGroups(tmp_path, 0, 1), "streamed")
    place, _, line = lines[1].partition(" ")
    kept = replay.from_json(line)
    assert whole[int(place)] == again[int(place)] == kept
    for group, other in zip(again, whole, strict=True):  # smaller batches round differently, and draw the same
        for wave in ("native", "rescue"):
            assert [r.token_ids for r in getattr(group, wave)] == [r.token_ids for r in getattr(other, wave)]
    generated = sum(len(r.token_ids) for g in whole for r in (*g.native, *g.rescue))
    assert engine.generated - before == generated - sum(len(r.token_ids) for r in (*kept.native, *kept.rescue))


def test_saved_groups_read_back_the_same(engine: LocalEngine):
    for group in sample(engine, lambda text: len(text) % 2 == 0):
        assert replay.from_json(replay.to_json(group)) == group


def test_interleave_undoes_dealing():
    dealt = [list(range(7))[rank::3] for rank in range(3)]
    assert between_ranks.interleave(dealt) == list(range(7))

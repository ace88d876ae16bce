"""The second wave as a stream: it starts early, overtakes, and changes no group. On the real engine."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from records import step_prompts
from test_scheduler import Nothing, Verdicts
from toy_runs import Toy
from transformers import AutoModelForCausalLM

from lens_megatron.config import LensConfig, RolloutConfig
from lens_megatron.results import SamplingStats
from lens_megatron.rollout.engine import Request
from lens_megatron.rollout.local import LocalEngine
from lens_megatron.rollout.progress import NoDisplay, ProgressDisplay, SamplingProgress
from lens_megatron.rollout.scheduler import RolloutScheduler
from lens_megatron.types import Group, Prompt, PurifiedPrompt

PROMPTS = [Prompt(i, tuple(range(5, 8 + i)), (False, *[True] * (2 + i)), "1", "p", "toy") for i in range(6)]
PURIFIED = [PurifiedPrompt(p.token_ids[1:], (0,), (0.0,) * len(p.token_ids)) if p.index % 3 else None for p in PROMPTS]
GROUP, LENGTH = 8, 40


class Watched(LocalEngine):
    """Writes down what it is given and what ends, in order."""

    def submit(self, requests: Sequence[Request]) -> None:
        requests = list(requests)
        self.log += [("start", r.request_id) for r in requests]
        super().submit(requests)

    def step(self) -> list:
        ended = super().step()
        self.log += [("end", completion.request_id) for completion in ended]
        return ended


@pytest.fixture(scope="module")
def engine(toy: Toy) -> Watched:
    engine = Watched(str(toy.model), max_running_sequences=64)
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(toy.model)
    weights = dict(model.named_parameters())
    engine.load_weights([(name, parameter.data) for name, parameter in weights.items()], 3)
    # Random weights end a completion once in a vocabulary; ten ends make lengths differ.
    engine.eos = torch.arange(10, 20)
    return engine


def sample(
    engine: Watched,
    rule: Callable[[str], bool],
    schedule: str = "streamed",
    *,
    running: int = 64,
    tau: float = 0.5,
    display: ProgressDisplay | None = None,
) -> tuple[list[Group], SamplingStats]:
    rollout = RolloutConfig(
        prompts_per_step=6,
        rollouts_per_prompt=GROUP,
        max_response_length=LENGTH,
        max_running_sequences=running,
        schedule=schedule,
    )
    lens = LensConfig(tau=tau)
    display = display or NoDisplay()
    scheduler = RolloutScheduler(
        engine, Verdicts(rule), lambda ids: str(list(ids)), rollout, lens, 11, Nothing(), display=display
    )
    engine.log, engine.max_running_sequences = [], running
    collected = scheduler.sample(step_prompts(PROMPTS, PURIFIED), step=2, version=3)
    return collected.groups, collected.stats


def odd(text: str) -> bool:
    return len(text) % 2 == 1


def drawn(groups: list[Group]) -> list:
    """Everything but log-probabilities, which batches of another size round differently."""
    return [
        replace(g, **{wave: tuple(replace(r, log_probs=()) for r in getattr(g, wave)) for wave in ("native", "rescue")})
        for g in groups
    ]


def log_probs(groups: list[Group]) -> torch.Tensor:
    return torch.tensor([p for g in groups for r in (*g.native, *g.rescue) for p in r.log_probs])


@pytest.mark.parametrize(("running", "tau"), [(64, 0.3), (7, 0.5), (16, 1.0)])
def test_all_schedules_make_the_same_groups(engine: Watched, running: int, tau: float):
    sequential, stats = sample(engine, odd, "sequential", running=running, tau=tau)
    assert stats.early_decisions == 0
    assert any(g.rescue for g in sequential) and not all(g.rescue for g in sequential)
    for schedule in ("streamed", "speculative"):
        groups, stats = sample(engine, odd, schedule, running=running, tau=tau)
        assert drawn(groups) == drawn(sequential)
        torch.testing.assert_close(log_probs(groups), log_probs(sequential), atol=1e-4, rtol=0)
        assert (engine.waiting, engine.running) == (deque(), [])


def test_a_guess_is_kept_or_taken_back(engine: Watched):
    """With room for all, every purified prompt's second wave starts at once. None is hard, or all are."""
    before = engine.generated
    groups, stats = sample(engine, lambda text: True, "speculative", running=200)
    assert [event for event in engine.log if event[0] == "start"] == [
        ("start", i) for i in [*_longest_first(), *range(48, 80)]
    ]
    kept = sum(len(r.token_ids) for g in groups for r in g.native)
    assert not any(g.rescue for g in groups) and stats.discarded_tokens == engine.generated - before - kept > 0
    groups, stats = sample(engine, lambda text: False, "speculative", running=200)
    assert [len(g.rescue) for g in groups] == [0, GROUP, GROUP, 0, GROUP, GROUP] and stats.discarded_tokens == 0
    again, _ = sample(engine, lambda text: False, "speculative", running=200)
    assert again == groups


def _longest_first() -> list[int]:
    return [i for p in reversed(range(6)) for i in range(p * GROUP, p * GROUP + GROUP)]


def test_engine_forgets_what_is_cancelled(engine: Watched):
    """One running and one waiting request are cancelled; a third one goes on as if it were alone."""

    def completed(numbers: Sequence[int], cancelled: Sequence[int]) -> tuple[dict, int]:
        engine.submit([Request(i, PROMPTS[i].token_ids, LENGTH, 1.0, 100 + i) for i in numbers])
        engine.step()
        tokens, found = engine.cancel(cancelled), {}
        while engine.running or engine.waiting:
            found |= {c.request_id: c.token_ids for c in engine.step()}
        return found, tokens

    engine.log, capacity = [], engine.max_running_sequences
    alone, _ = completed([3], [])
    assert completed([2, 3, 4], [2, 4, 99]) == (alone, 2)
    engine.max_running_sequences = 2
    assert completed([2, 3, 4], [2, 4]) == (alone, 1)
    engine.max_running_sequences = capacity


def test_a_hard_group_does_not_wait_for_its_last_rollout(engine: Watched):
    """All fail: the second wave starts when 5 of 8 have, since 3 of 8 are below a half."""
    groups, stats = sample(engine, lambda text: False)
    assert [len(g.rescue) for g in groups] == [0, GROUP, GROUP, 0, GROUP, GROUP]
    native = len(PROMPTS) * GROUP
    order = [number for _, number in engine.log]
    events = {event: place for place, event in enumerate(engine.log)}
    assert stats.early_decisions > 0
    first_of_second = min(events["start", i] for i in order if i >= native)
    assert first_of_second < max(events["end", i] for i in range(native))
    assert stats.seconds > stats.engine_seconds > 0


def test_the_barrier_of_the_sequential_schedule(engine: Watched):
    _, stats = sample(engine, lambda text: False, "sequential")
    events = {event: place for place, event in enumerate(engine.log)}
    native = len(PROMPTS) * GROUP
    assert max(events["end", i] for i in range(native)) < min(p for (_, i), p in events.items() if i >= native)
    assert stats.early_decisions == 0 and stats.second_wave_seconds > 0


def test_the_longest_prompt_is_first_and_second_waves_overtake(engine: Watched):
    """Prompts have 3 to 8 tokens, so requests of prompt 5 (ids 40 to 47) start first; then one place at a time."""
    sample(engine, lambda text: False, running=4)
    started = [number for what, number in engine.log if what == "start"]
    native = len(PROMPTS) * GROUP
    assert started[:4] == [40, 41, 42, 43]
    assert [i for i in started if i < native] == _longest_first()
    begin = started.index(native)
    assert started[begin : begin + GROUP] == list(range(native, native + GROUP))  # nothing came between
    assert begin < native - GROUP


class Display:
    """Keeps what it is told to show."""

    def __init__(self) -> None:
        self.begun, self.seen, self.ended = [], [], 0

    def begin(self, step: int) -> None:
        self.begun.append(step)

    def show(self, progress: SamplingProgress) -> None:
        self.seen.append(progress)

    def end(self) -> None:
        self.ended += 1


def test_progress_counts_both_waves_and_what_waits(engine: Watched):
    display = Display()
    groups, _ = sample(engine, odd, running=10, display=display)
    seen = display.seen
    assert (display.begun, display.ended) == ([2], 1)
    rollouts = sum(len(g.native) + len(g.rescue) for g in groups)
    assert seen[0].total == 48 and seen[0].second_wave == 0
    assert seen[0].running + seen[0].waiting + seen[0].finished == 48 and seen[0].running <= 10
    assert (seen[-1].finished, seen[-1].total) == (rollouts, rollouts)
    assert seen[-1].second_wave == rollouts - 48 and seen[-1].waiting == 0
    assert [p.finished for p in seen] == sorted(p.finished for p in seen)
    assert all(p.tokens_per_second > 0 for p in seen)


def test_without_purified_prompts_nothing_is_decided(engine: Watched):
    """Nobody waits for a grader before the last rollout of such a group."""
    rollout = RolloutConfig(prompts_per_step=6, rollouts_per_prompt=GROUP, max_response_length=LENGTH)
    verdicts, asked = Verdicts(lambda text: False), []
    verdicts.wait = lambda tickets: asked.append(len(tickets)) or {t: verdicts.grades[t] for t in tickets}
    engine.log = []
    scheduler = RolloutScheduler(engine, verdicts, str, rollout, LensConfig(), 11, Nothing())
    groups = scheduler.sample(step_prompts(PROMPTS), step=2, version=3).groups
    assert asked == [GROUP] * 6 and not any(g.rescue for g in groups)

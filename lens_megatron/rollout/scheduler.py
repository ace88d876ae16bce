"""Two waves through one engine: wave 1 of every prompt, and wave 2 of a purified prompt as soon as its group is hard.

    submit wave 1 -> engine.step ... -> last of a group done -> graded -> below tau? -> submit wave 2 -> ... -> Group

Graders run in other processes while the engine goes on. What the engine is given, and between which of its steps, does
not depend on how fast they are: a group's verdict is read GRADING_STEPS engine steps after its last rollout ended (or
when the engine has nothing left to do), and waited for if it is not there. So two runs are equal bit for bit.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from lens_megatron.config import LensConfig, RolloutConfig
from lens_megatron.purify import is_hard
from lens_megatron.reward import Grade
from lens_megatron.rollout.engine import Completion, EngineProgress, Request, RolloutEngine
from lens_megatron.seeds import derive
from lens_megatron.types import Group, Origin, Prompt, PurifiedPrompt, Rollout, Status

GRADING_STEPS = 8


class GroupStore(Protocol):
    """What the scheduler needs of `unfinished.UnfinishedGroups`."""

    def read(self, step: int, prompts: Sequence[Prompt], version: int) -> dict[int, Group]: ...

    def append(self, step: int, group: Group) -> None: ...


class Grader(Protocol):
    """What the scheduler needs of `reward.GraderPool`."""

    def submit(self, completion: str, answer: str, *, meta: dict | None = None) -> int: ...

    def wait(self, tickets: Sequence[int]) -> dict[int, Grade]: ...


@dataclass(slots=True)
class _Wave:
    """G completions of one prompt, on their way."""

    place: int
    origin: Origin
    completions: dict[int, Completion] = field(default_factory=dict)
    """By sample number."""
    tickets: dict[int, int] = field(default_factory=dict)
    due: int | None = None
    """Engine step at which the verdict is read."""


@dataclass(slots=True)
class Sampler:
    """Samples and grades the groups of a step on one engine."""

    engine: RolloutEngine
    grader: Grader
    decode: Callable[[Sequence[int]], str]
    rollout: RolloutConfig
    lens: LensConfig
    seed: int
    store: GroupStore
    """Where graded groups are kept until their step is done."""
    on_progress: Callable[[int, EngineProgress], None] = lambda finished, progress: None

    def sample(
        self, prompts: Sequence[Prompt], purified: Sequence[PurifiedPrompt | None], step: int, version: int
    ) -> list[Group]:
        """Both waves of every prompt, graded, in the order of `prompts`; weights of `version` are in the engine.

        What an interrupted attempt at this step has kept is not sampled again.
        """
        run = _Run(self, prompts, purified, step, self.store.read(step, prompts, version))
        for place in range(len(prompts)):
            if place not in run.groups:
                run.submit(place, Origin.NATIVE)
        return run.finish()


class _Run:
    """The state of one call of `Sampler.sample`."""

    def __init__(
        self, sampler: Sampler, prompts: Sequence[Prompt], purified: Sequence, step: int, kept: dict[int, Group]
    ):
        self.sampler, self.prompts, self.purified, self.step = sampler, prompts, purified, step
        self.groups = kept
        self.requests: dict[int, tuple[_Wave, int]] = {}
        self.waiting: list[_Wave] = []
        self.graded: dict[int, tuple[Rollout, ...]] = {}
        """First waves of hard groups, by place."""
        self.finished = self.next_id = self.tick = 0

    def submit(self, place: int, origin: Origin) -> None:
        config, prompt = self.sampler.rollout, self.prompts[place]
        tokens = prompt.token_ids if origin is Origin.NATIVE else self.purified[place].token_ids
        wave, requests = _Wave(place, origin), []
        for sample in range(config.rollouts_per_prompt):
            self.requests[self.next_id] = (wave, sample)
            seed = derive(self.sampler.seed, origin, self.step, prompt.index, sample)
            requests.append(Request(self.next_id, tokens, config.max_response_length, config.temperature, seed))
            self.next_id += 1
        self.sampler.engine.submit(requests)

    def finish(self) -> list[Group]:
        while self.requests or self.waiting:
            for completion in self.sampler.engine.step() if self.requests else ():
                self._completed(completion)
            self.tick += 1
            self.sampler.on_progress(self.finished, self.sampler.engine.progress())
            self._read_verdicts()
        return [self.groups[place] for place in range(len(self.prompts))]

    def _completed(self, completion: Completion) -> None:
        wave, sample = self.requests.pop(completion.request_id)
        text = self.sampler.decode(completion.token_ids)
        wave.completions[sample] = completion
        wave.tickets[sample] = self.sampler.grader.submit(text, self.prompts[wave.place].answer)
        self.finished += 1
        if len(wave.completions) == self.sampler.rollout.rollouts_per_prompt:
            wave.due = self.tick + GRADING_STEPS
            self.waiting.append(wave)

    def _read_verdicts(self) -> None:
        due = [wave for wave in self.waiting if not self.requests or wave.due <= self.tick]
        self.waiting = [wave for wave in self.waiting if wave not in due]
        for wave in sorted(due, key=lambda wave: wave.place):
            grades = self.sampler.grader.wait(list(wave.tickets.values()))
            rollouts = tuple(
                _rollout(wave.completions[s], grades[wave.tickets[s]], wave.origin) for s in sorted(wave.completions)
            )
            if wave.origin is Origin.RESCUED:
                self._done(wave.place, self.graded[wave.place], rollouts)
                continue
            rate = sum(r.correct for r in rollouts) / len(rollouts)
            if is_hard(rate, self.sampler.lens) and self.purified[wave.place] is not None:
                self.graded[wave.place] = rollouts
                self.submit(wave.place, Origin.RESCUED)
            else:
                self._done(wave.place, rollouts, ())

    def _done(self, place: int, native: tuple[Rollout, ...], rescue: tuple[Rollout, ...]) -> None:
        group = Group(self.prompts[place], native, self.purified[place], rescue)
        self.groups[place] = group
        self.sampler.store.append(self.step, group)


def _rollout(completion: Completion, grade: Grade, origin: Origin) -> Rollout:
    return Rollout(
        token_ids=completion.token_ids,
        log_probs=completion.log_probs,
        finished=completion.finished,
        origin=origin,
        weight_version=completion.weight_version,
        reward=grade.score,
        status=Status(grade.status),
    )

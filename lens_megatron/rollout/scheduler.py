"""Two waves through one engine: wave 1 of every prompt, and wave 2 of a purified prompt as soon as its group is hard.

    queue wave 1 -> engine.step ... -> rollouts graded -> below tau for certain? -> queue wave 2 -> ... -> Group

A group is hard for certain when the rollouts not yet graded could not lift it to tau, were they all correct: that is
known before its last rollout ends, and changes no group, only when its second wave starts. With
`rollout.schedule=sequential` it starts after the first waves of all prompts instead; with `speculative` also earlier,
wherever the engine has room, for the group that looks hardest, and is taken back if the group turns out not to be hard.

Second waves end the step, so they overtake what is waiting in the queue (rollout/queue.py). Graders run in other
processes while the engine goes on. What is queued, and between which of the engine's steps, does not depend on how fast
they are: a verdict is read GRADING_STEPS steps after its rollout ended (or when no request is left), and waited for if
it is not there. So two runs are equal bit for bit where every engine serves its own rank only. A rollout's seed is a
function of its prompt, wave and number, so neither the schedule nor the engine changes what is drawn.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from lens_megatron.algorithms.rescue import is_hard
from lens_megatron.config import LensConfig, RolloutConfig
from lens_megatron.reward import Grade, GradeStatus
from lens_megatron.rollout.engine import Completion, Request, RolloutEngine
from lens_megatron.rollout.progress import Meter, SamplingProgress
from lens_megatron.rollout.queue import open_queue
from lens_megatron.rollout.request_store import RequestStore
from lens_megatron.seeds import derive
from lens_megatron.types import Group, Origin, Prompt, PurifiedPrompt, Rollout, SamplingStats

GRADING_STEPS = 8


class GroupStore(Protocol):
    """What the scheduler needs of `unfinished.UnfinishedGroups`."""

    def read(self, step: int, prompts: Sequence[Prompt], version: int) -> dict[int, Group]: ...

    def append(self, step: int, group: Group) -> None: ...


class Grader(Protocol):
    """What the scheduler needs of `reward.GraderPool`."""

    def submit(self, completion: str, answer: str, *, meta: dict | None = None) -> int: ...

    def wait(self, tickets: Sequence[int]) -> dict[int, Grade]: ...


def prompt_length(prompt: Prompt) -> float:
    """What is known of a prompt before it was sampled. No memory of earlier steps: a resumed run has none."""
    return float(len(prompt.token_ids))


@dataclass(slots=True, eq=False)
class _Wave:
    """G completions of one prompt, on their way."""

    place: int
    origin: Origin
    completions: dict[int, Completion] = field(default_factory=dict)
    """By sample number."""
    tickets: dict[int, int] = field(default_factory=dict)
    due: dict[int, int] = field(default_factory=dict)
    """Engine step at which a sample's verdict may be read."""
    grades: dict[int, Grade] = field(default_factory=dict)
    """Those that were read."""
    hard: bool = False
    """Its second wave is queued, or held back for the barrier."""

    @property
    def failures(self) -> int:
        return sum(grade.status is not GradeStatus.CORRECT for grade in self.grades.values())

    @property
    def successes(self) -> int:
        return len(self.grades) - self.failures


@dataclass(slots=True)
class RolloutScheduler:
    """Samples and grades the groups of a step on one engine."""

    engine: RolloutEngine
    grader: Grader
    decode: Callable[[Sequence[int]], str]
    rollout: RolloutConfig
    lens: LensConfig
    seed: int
    store: GroupStore
    """Where graded groups are kept until their step is done."""
    request_store: RequestStore | None = None
    """Given: the engines of all ranks share their work, and `sample` must be called on all of them."""
    on_progress: Callable[[SamplingProgress], None] = lambda progress: None
    expected_length: Callable[[Prompt], float] = prompt_length
    """Of first-wave rollouts, in any unit: the longest are started first. Must be the same in a resumed run."""
    stats: SamplingStats = SamplingStats()
    """Of the last call of `sample`."""

    def sample(
        self, prompts: Sequence[Prompt], purified: Sequence[PurifiedPrompt | None], step: int, version: int
    ) -> list[Group]:
        """Both waves of every prompt, graded, in the order of `prompts`; weights of `version` are in the engine.

        What an interrupted attempt at this step has kept is not sampled again.
        """
        run = _Run(self, prompts, purified, step, self.store.read(step, prompts, version))
        for place in range(len(prompts)):
            if place not in run.groups:
                run.queue_wave(place, Origin.NATIVE, self.expected_length(prompts[place]))
        groups = run.finish()
        self.stats = run.meter.stats(run.queue.discarded_tokens)
        return groups


class _Run:
    """The state of one call of `RolloutScheduler.sample`."""

    def __init__(
        self,
        sampler: RolloutScheduler,
        prompts: Sequence[Prompt],
        purified: Sequence,
        step: int,
        kept: dict[int, Group],
    ):
        self.sampler, self.prompts, self.purified, self.step = sampler, prompts, purified, step
        self.groups = kept
        self.meter = Meter(sampler.engine.progress().generated_tokens)
        self.queue = open_queue(sampler.engine, sampler.request_store, self.meter.engine_step)
        self.requests: dict[int, tuple[_Wave, int]] = {}
        """Queued and in the engine."""
        self.waves: list[_Wave] = []
        """Not yet graded to the end."""
        self.held: list[tuple[int, float]] = []
        """Hard places of the sequential schedule and their expected lengths, until the first waves are done."""
        self.guessed: dict[int, _Wave] = {}
        """Second waves of groups that may turn out not to be hard, by place."""
        self.abandoned: list[int] = []
        """Tickets of waves taken back."""
        self.rollouts: dict[tuple[int, Origin], tuple[Rollout, ...]] = {}
        self.next_id, self.tick = self.queue.first_id, 0

    def queue_wave(self, place: int, origin: Origin, expected_length: float, *, urgent: bool = False) -> _Wave:
        config, prompt = self.sampler.rollout, self.prompts[place]
        tokens = prompt.token_ids if origin is Origin.NATIVE else self.purified[place].token_ids
        wave = _Wave(place, origin)
        self.waves.append(wave)
        requests = []
        for sample in range(config.rollouts_per_prompt):
            self.requests[self.next_id] = (wave, sample)
            seed = derive(self.sampler.seed, origin, self.step, prompt.index, sample)
            requests.append(Request(self.next_id, tokens, config.max_response_length, config.temperature, seed))
            self.next_id += self.queue.id_step
        self.queue.add(requests, urgent=urgent, expected_length=expected_length)
        self.meter.queued(origin, config.rollouts_per_prompt)
        return wave

    def finish(self) -> list[Group]:
        while self.waves:
            while self.queue.room() > 0 and self._guess():
                pass
            for completion in self.queue.step():
                self._completed(completion)
            self.tick += 1
            self._read_verdicts()
            self.sampler.on_progress(self.meter.progress(self.sampler.engine.progress(), self.queue.waiting))
        self.queue.finish()
        if self.abandoned:
            self.sampler.grader.wait(self.abandoned)  # taken, so that the pool does not keep them
        return [self.groups[place] for place in range(len(self.prompts))]

    def _guess(self) -> bool:
        """Queues the second wave of the undecided group with most failures, fewest successes. False: none is left."""
        if self.sampler.rollout.schedule != "speculative":
            return False
        undecided = [w for w in self.waves if self._undecided(w) and w.place not in self.guessed]
        if not undecided:
            return False
        wave = max(undecided, key=lambda w: (w.failures - w.successes, -w.place))
        self.guessed[wave.place] = self.queue_wave(wave.place, Origin.PURIFIED, 0.0)
        return True

    def _undecided(self, wave: _Wave) -> bool:
        """A first wave whose second is neither certain nor out of the question."""
        first = wave.origin is Origin.NATIVE and self.purified[wave.place] is not None
        return first and not wave.hard and self._is_hard(self.sampler.rollout.rollouts_per_prompt - wave.successes)

    def _take_back(self, place: int) -> None:
        wave = self.guessed.pop(place)
        if wave in self.waves:
            self.waves.remove(wave)
        self.rollouts.pop((place, Origin.PURIFIED), None)
        gone = {number for number, (owner, _) in self.requests.items() if owner is wave}
        for number in gone:
            del self.requests[number]
        self.queue.cancel(gone)
        self.abandoned += wave.tickets.values()
        self.meter.taken_back(len(gone), sum(len(c.token_ids) for c in wave.completions.values()))

    def _completed(self, completion: Completion) -> None:
        wave, sample = self.requests.pop(completion.request_id)
        text = self.sampler.decode(completion.token_ids)
        wave.completions[sample] = completion
        wave.tickets[sample] = self.sampler.grader.submit(text, self.prompts[wave.place].answer)
        wave.due[sample] = self.tick + GRADING_STEPS
        self.meter.completed(wave.origin)

    def _read_verdicts(self) -> None:
        size, idle = self.sampler.rollout.rollouts_per_prompt, not self.requests
        for wave in sorted(self.waves, key=lambda wave: (wave.place, wave.origin is Origin.PURIFIED)):
            if wave not in self.waves:
                continue  # taken back a moment ago
            due = [sample for sample in wave.tickets if idle or wave.due[sample] <= self.tick]
            if len(due) + len(wave.grades) == size:
                self._read(wave, due)
                self._graded(wave)
            elif self._may_decide(wave, len(due)):
                self._read(wave, due)
                if self._is_hard(wave.failures):
                    self.meter.early_decisions += 1
                    self._rescue(wave)
                elif not self._undecided(wave) and wave.place in self.guessed:
                    self._take_back(wave.place)
        if self.held and all(wave.origin is Origin.PURIFIED for wave in self.waves):
            for place, length in self.held:
                self.queue_wave(place, Origin.PURIFIED, length, urgent=True)
            self.held = []

    def _may_decide(self, wave: _Wave, due: int) -> bool:
        """Whether `due` verdicts could change what is sampled. Otherwise nobody waits for a grader on their account."""
        schedule = self.sampler.rollout.schedule
        if schedule == "sequential" or due == 0 or not self._undecided(wave):
            return False
        return schedule == "speculative" or self._is_hard(wave.failures + due)

    def _is_hard(self, failures: int) -> bool:
        """Were all other rollouts of the group correct."""
        size = self.sampler.rollout.rollouts_per_prompt
        return is_hard((size - failures) / size, self.sampler.lens)

    def _read(self, wave: _Wave, samples: Sequence[int]) -> None:
        grades = self.sampler.grader.wait([wave.tickets[sample] for sample in samples])
        self.meter.regraded += sum(grade.regraded for grade in grades.values())
        wave.grades |= {sample: grades[wave.tickets.pop(sample)] for sample in samples}

    def _rescue(self, wave: _Wave) -> None:
        """Queues the second wave, expected to be as long as what the first has shown."""
        wave.hard = True
        if self.guessed.pop(wave.place, None):
            return
        length = sum(len(c.token_ids) for c in wave.completions.values()) / len(wave.completions)
        if self.sampler.rollout.schedule == "sequential":
            self.held.append((wave.place, length))
        else:
            self.queue_wave(wave.place, Origin.PURIFIED, length, urgent=True)

    def _graded(self, wave: _Wave) -> None:
        """The last rollout of a wave is graded."""
        self.waves.remove(wave)
        place, native = wave.place, wave.origin is Origin.NATIVE
        self.rollouts[place, wave.origin] = tuple(
            _rollout(wave.completions[s], wave.grades[s], wave.origin) for s in sorted(wave.completions)
        )
        if native and not wave.hard and self.purified[place] is not None and self._is_hard(wave.failures):
            self._rescue(wave)
        elif native and not wave.hard and place in self.guessed:
            self._take_back(place)
        first, second = (self.rollouts.get((place, origin)) for origin in (Origin.NATIVE, Origin.PURIFIED))
        if first and (second or (native and not wave.hard)):
            group = Group(self.prompts[place], first, self.purified[place], second or ())
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
        status=GradeStatus(grade.status),
    )

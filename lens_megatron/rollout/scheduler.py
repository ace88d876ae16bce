"""Samples two waves on one engine: wave 1 of every prompt, wave 2 of a purified prompt as soon as its group is hard.

    queue wave 1 -> engine.step ... -> rollouts graded -> below tau for certain? -> queue wave 2 -> ... -> Group

A group is hard for certain when the rollouts that are not graded yet could not lift it to tau, were they all correct.
That is known before its last rollout ends, and decides only when its second wave starts, not what is in the group. With
`rollout.schedule=sequential` second waves start after the first waves of all prompts instead. With `speculative` they
also start earlier: wherever the engine has room, that of the group which looks hardest starts, and it is cancelled if
the group turns out not to be hard.

A step may reject groups. Then only the first of its prompts start, and the others, in their order, as groups are
rejected (rollout/refill.py). What starts is the same under every schedule.

Second waves end the step, so they overtake what is waiting in the queue (rollout/queue.py). Graders run in other
processes while the engine goes on. What is queued, and between which of the engine's steps, does not depend on how fast
they are: a verdict is read GRADING_STEPS steps after its rollout ended (or when no request is left), and waited for if
it is not there. So two runs are equal bit for bit where every engine serves its own rank only, and none waits for
rejections at others. A rollout's seed is a function of its prompt's place in the step, of its wave and of its number,
so neither the schedule nor the engine nor the number of ranks changes what is drawn.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from lens_megatron.algorithms.rescue import is_hard
from lens_megatron.config import LensConfig, RolloutConfig
from lens_megatron.results import CollectedGroups
from lens_megatron.reward import AnswerFacts, Grade, GradeStatus
from lens_megatron.rollout.engine import Completion, Request, RolloutEngine
from lens_megatron.rollout.progress import NoDisplay, ProgressDisplay, SamplingRecorder
from lens_megatron.rollout.queue import open_queue
from lens_megatron.rollout.refill import NO_REFILL, Refill
from lens_megatron.rollout.request_store import RequestStore
from lens_megatron.rollout.rewarding import Rewarding, answer_facts
from lens_megatron.seeds import derive
from lens_megatron.types import Group, Origin, Prompt, Rollout, StepPrompt

GRADING_STEPS = 8
"""The number of the engine's steps between the end of a rollout and the reading of its verdict."""


class GroupStore(Protocol):
    """The part of `unfinished.UnfinishedGroups` that the scheduler needs."""

    def read(self, step: int, prompts: Sequence[StepPrompt], version: int) -> dict[int, Group]:
        """Returns the groups of `prompts` that an interrupted attempt at `step` has kept, by place in the step."""

    def append(self, step: int, place: int, group: Group) -> None:
        """Keeps the group of the prompt at `place`."""


class Grader(Protocol):
    """The part of `reward.GraderPool` that the scheduler needs."""

    def submit(self, completion: str, answer: str, *, facts: AnswerFacts | None = None) -> int: ...

    def wait(self, tickets: Sequence[int]) -> dict[int, Grade]: ...


Keep = Callable[[Group], bool]
"""Says whether the step wants a group. It must be a pure function."""


def keep_all(group: Group) -> bool:
    """Returns True: the step wants every group."""
    return True


def prompt_length(prompt: Prompt) -> float:
    """The length of a prompt in tokens, the only hint at the length of its rollouts that a resumed run has too."""
    return float(len(prompt.token_ids))


@dataclass(slots=True, eq=False)
class _Wave:
    """G completions of one prompt, of which some are still to come."""

    prompt: StepPrompt
    origin: Origin
    completions: dict[int, Completion] = field(default_factory=dict)
    """Completions by sample number."""
    tickets: dict[int, int] = field(default_factory=dict)
    """The grader's tickets by sample number, until the verdict is read."""
    due: dict[int, int] = field(default_factory=dict)
    """The number of the engine's step at which a sample's verdict may be read."""
    grades: dict[int, Grade] = field(default_factory=dict)
    """Verdicts that were read, by sample number."""
    hard: bool = False
    """True when the group is known to be hard, so that its second wave is queued or postponed."""

    @property
    def place(self) -> int:
        return self.prompt.place

    @property
    def failures(self) -> int:
        return sum(grade.status is not GradeStatus.CORRECT for grade in self.grades.values())

    @property
    def successes(self) -> int:
        return len(self.grades) - self.failures

    @property
    def mean_length(self) -> float:
        """The mean length, in tokens, of the completions that have come."""
        return sum(len(completion.token_ids) for completion in self.completions.values()) / len(self.completions)


@dataclass(frozen=True, slots=True)
class RolloutScheduler:
    """Samples and grades the groups of a step on one engine."""

    engine: RolloutEngine
    grader: Grader
    decode: Callable[[Sequence[int]], str]
    rollout: RolloutConfig
    lens: LensConfig
    seed: int
    store: GroupStore
    """The place where graded groups are kept until their step is done."""
    request_store: RequestStore | None = None
    """If a store is given, the engines of all ranks share their work, and `sample` must be called on all of them."""
    display: ProgressDisplay = NoDisplay()
    expected_length: Callable[[Prompt], float] = prompt_length
    """The expected length of first-wave rollouts, in any unit: the longest are started first. It must be the same in a
    resumed run."""
    rewarding: Rewarding = Rewarding()
    """What changes grades before they decide anything."""

    def sample(
        self,
        prompts: Sequence[StepPrompt],
        step: int,
        version: int,
        *,
        keep: Keep = keep_all,
        refill: Refill = NO_REFILL,
    ) -> CollectedGroups:
        """Returns both waves of every prompt that has started, graded, in the order of `prompts`.

        The engine has the weights of `version`. What an interrupted attempt at this step has kept is not sampled again.

        Args:
            prompts: their places must differ.
            keep: says whether the step wants a group. Those that it rejects are returned too.
            refill: says how many places of the step may start, given what `keep` has said. By default all start.

        Raises:
            EnginesLostError: no engine is left that could sample.
        """
        sampling = _Sampling(self, prompts, step, self.store.read(step, prompts, version), keep, refill)
        self.display.begin(step)
        try:
            sampling.finish()
        finally:
            self.display.end()
        groups = [sampling.groups[prompt.place] for prompt in prompts if prompt.place in sampling.groups]
        return CollectedGroups(groups, sampling.recorder.stats(sampling.queue.discarded_tokens))


class _Sampling:
    """The state of one call of `RolloutScheduler.sample`."""

    def __init__(
        self,
        scheduler: RolloutScheduler,
        prompts: Sequence[StepPrompt],
        step: int,
        found: Mapping[int, Group],
        keep: Keep,
        refill: Refill,
    ):
        self.scheduler, self.step, self.keep, self.refill = scheduler, step, keep, refill
        self.candidates = tuple(prompts)
        """Prompts that have not started."""
        self.found = found
        """Groups of an interrupted attempt, by place. Such a group is done as soon as its prompt starts."""
        self.groups: dict[int, Group] = {}
        """Finished groups by place."""
        self.recorder = SamplingRecorder(scheduler.engine.progress().generated_tokens)
        self.queue = open_queue(scheduler.engine, scheduler.request_store, self.recorder.engine_step)
        self.requests: dict[int, tuple[_Wave, int]] = {}
        """The wave and the sample number of every request that is queued or in the engine, by request id."""
        self.waves: list[_Wave] = []
        """Waves that are not graded to the end."""
        self.postponed: list[tuple[StepPrompt, float]] = []
        """Hard prompts of the sequential schedule and the expected lengths of their second waves, which begin when all
        first waves are done."""
        self.speculative: dict[int, _Wave] = {}
        """Second waves, by place, that were started before their groups were known to be hard."""
        self.abandoned_tickets: list[int] = []
        """The grader's tickets of cancelled waves."""
        self.rollouts: dict[tuple[int, Origin], tuple[Rollout, ...]] = {}
        """Graded waves by place and origin."""
        self.next_id, self.engine_steps = self.queue.first_id, 0

    def _start_candidates(self) -> None:
        """Starts the prompts that may start now."""
        while starting := self._may_start():
            places = {prompt.place for prompt in starting}
            self.candidates = tuple(prompt for prompt in self.candidates if prompt.place not in places)
            for prompt in starting:
                if prompt.place in self.found:
                    self._decided(prompt.place, self.found[prompt.place])  # which may let another one start
                else:
                    self.queue_wave(prompt, Origin.NATIVE, self.scheduler.expected_length(prompt.prompt))

    def _may_start(self) -> tuple[StepPrompt, ...]:
        limit = self.refill.limit() if self.candidates else 0
        return tuple(prompt for prompt in self.candidates if prompt.place < limit)

    def queue_wave(self, prompt: StepPrompt, origin: Origin, expected_length: float, *, urgent: bool = False) -> _Wave:
        config = self.scheduler.rollout
        wave = _Wave(prompt, origin)
        self.waves.append(wave)
        tokens, requests = _generation_prompt(prompt, origin), []
        for sample in range(config.rollouts_per_prompt):
            self.requests[self.next_id] = (wave, sample)
            seed = derive(self.scheduler.seed, origin, self.step, prompt.place, sample)
            requests.append(Request(self.next_id, tokens, config.max_response_length, config.temperature, seed))
            self.next_id += self.queue.id_step
        self.queue.add(requests, urgent=urgent, expected_length=expected_length)
        self.recorder.queued(origin, config.rollouts_per_prompt)
        return wave

    def finish(self) -> None:
        """Samples until every group is there that may start."""
        self._start_candidates()
        while self.waves or (self.candidates and not self.refill.is_over()):
            while self.queue.room() > 0 and self._start_speculative_wave():
                pass
            for completion in self.queue.step():
                self._completed(completion)
            self.engine_steps += 1
            self._read_verdicts()
            self._start_candidates()
            engine = self.scheduler.engine.progress()
            self.scheduler.display.show(self.recorder.progress(engine, self.queue.waiting))
        self.queue.finish()
        if self.abandoned_tickets:
            self.scheduler.grader.wait(self.abandoned_tickets)  # the pool would keep what nobody takes

    def _start_speculative_wave(self) -> bool:
        """Queues the second wave of the undecided group with most failures, fewest successes; False if none is left."""
        if self.scheduler.rollout.schedule != "speculative":
            return False
        undecided = [w for w in self.waves if self._is_undecided(w) and w.place not in self.speculative]
        if not undecided:
            return False
        wave = max(undecided, key=lambda w: (w.failures - w.successes, -w.place))
        self.speculative[wave.place] = self.queue_wave(wave.prompt, Origin.PURIFIED, 0.0)
        return True

    def _is_undecided(self, wave: _Wave) -> bool:
        """Returns whether it is a first wave whose second wave is neither certain nor out of the question."""
        first = wave.origin is Origin.NATIVE and wave.prompt.purified is not None
        return first and not wave.hard and self._is_hard(self.scheduler.rollout.rollouts_per_prompt - wave.successes)

    def _cancel_speculative_wave(self, place: int) -> None:
        wave = self.speculative.pop(place)
        if wave in self.waves:
            self.waves.remove(wave)
        self.rollouts.pop((place, Origin.PURIFIED), None)
        unfinished = {number for number, (owner, _) in self.requests.items() if owner is wave}
        for number in unfinished:
            del self.requests[number]
        self.queue.cancel(unfinished)
        self.abandoned_tickets += wave.tickets.values()
        self.recorder.cancelled(len(unfinished), sum(len(c.token_ids) for c in wave.completions.values()))

    def _completed(self, completion: Completion) -> None:
        wave, sample = self.requests.pop(completion.request_id)
        text = self.scheduler.decode(completion.token_ids)
        wave.completions[sample] = completion
        prompt = wave.prompt.prompt
        wave.tickets[sample] = self.scheduler.grader.submit(text, prompt.answer, facts=answer_facts(prompt, completion))
        wave.due[sample] = self.engine_steps + GRADING_STEPS
        self.recorder.completed(wave.origin)

    def _read_verdicts(self) -> None:
        size, idle = self.scheduler.rollout.rollouts_per_prompt, not self.requests
        for wave in sorted(self.waves, key=lambda wave: (wave.place, wave.origin is Origin.PURIFIED)):
            if wave not in self.waves:
                continue  # an earlier turn of this loop has cancelled it
            due = [sample for sample in wave.tickets if idle or wave.due[sample] <= self.engine_steps]
            if len(due) + len(wave.grades) == size:
                self._read(wave, due)
                self._finish_wave(wave)
            elif self._may_decide(wave, len(due)):
                self._read(wave, due)
                if self._is_hard(wave.failures):
                    self.recorder.early_decisions += 1
                    self._start_second_wave(wave)
                elif not self._is_undecided(wave) and wave.place in self.speculative:
                    self._cancel_speculative_wave(wave.place)
        if self.postponed and all(wave.origin is Origin.PURIFIED for wave in self.waves):
            for prompt, length in self.postponed:
                self.queue_wave(prompt, Origin.PURIFIED, length, urgent=True)
            self.postponed = []

    def _may_decide(self, wave: _Wave, due: int) -> bool:
        """Returns whether `due` verdicts could change what is sampled. If not, nobody need wait for the grader."""
        schedule = self.scheduler.rollout.schedule
        if schedule == "sequential" or due == 0 or not self._is_undecided(wave):
            return False
        return schedule == "speculative" or self._is_hard(wave.failures + due)

    def _is_hard(self, failures: int) -> bool:
        """Returns whether a group with so many failures is hard, were all its other rollouts correct."""
        size = self.scheduler.rollout.rollouts_per_prompt
        return is_hard((size - failures) / size, self.scheduler.lens)

    def _read(self, wave: _Wave, samples: Sequence[int]) -> None:
        """Reads the verdicts of these samples, and waits for those that are not there."""
        grades = self.scheduler.grader.wait([wave.tickets[sample] for sample in samples])
        self.recorder.regraded += sum(grade.regraded for grade in grades.values())
        wave.grades |= {sample: self._rewarded(wave, sample, grades[wave.tickets.pop(sample)]) for sample in samples}

    def _rewarded(self, wave: _Wave, sample: int, grade: Grade) -> Grade:
        """Returns the grade after the reward rules and the success threshold."""
        scheduler, completion = self.scheduler, wave.completions[sample]
        return scheduler.rewarding.final(
            grade,
            wave.prompt,
            wave.origin,
            sample,
            completion,
            scheduler.decode(completion.token_ids) if scheduler.rewarding.rules else "",
            step=self.step,
            run_seed=scheduler.seed,
            max_response_length=scheduler.rollout.max_response_length,
        )

    def _start_second_wave(self, first: _Wave) -> None:
        """Queues the second wave of a hard group, unless it runs already. It is expected to be as long as the first."""
        first.hard = True
        if self.speculative.pop(first.place, None):
            return
        if self.scheduler.rollout.schedule == "sequential":
            self.postponed.append((first.prompt, first.mean_length))
        else:
            self.queue_wave(first.prompt, Origin.PURIFIED, first.mean_length, urgent=True)

    def _finish_wave(self, wave: _Wave) -> None:
        """Notes that the last rollout of a wave is graded: its group may now be hard for certain, or done."""
        self.waves.remove(wave)
        place, native = wave.place, wave.origin is Origin.NATIVE
        self.rollouts[place, wave.origin] = tuple(
            _rollout(wave.completions[s], wave.grades[s], wave.origin) for s in sorted(wave.completions)
        )
        if native and not wave.hard and wave.prompt.purified is not None and self._is_hard(wave.failures):
            self._start_second_wave(wave)
        elif native and not wave.hard and place in self.speculative:
            self._cancel_speculative_wave(place)
        first, second = (self.rollouts.get((place, origin)) for origin in (Origin.NATIVE, Origin.PURIFIED))
        if first and (second or (native and not wave.hard)):
            group = Group(wave.prompt.prompt, first, wave.prompt.purified, second or (), place)
            self.scheduler.store.append(self.step, place, group)  # first: others may start candidates for it
            self._decided(place, group)

    def _decided(self, place: int, group: Group) -> None:
        self.groups[place] = group
        self.refill.decided(kept=self.keep(group))


def _generation_prompt(prompt: StepPrompt, origin: Origin) -> tuple[int, ...]:
    """Returns token ids of the prompt that a wave is sampled from."""
    if origin is Origin.NATIVE:
        return prompt.prompt.token_ids
    if prompt.purified is None:
        raise ValueError(f"the prompt at place {prompt.place} has no purified prompt to sample a second wave from")
    return prompt.purified.token_ids


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

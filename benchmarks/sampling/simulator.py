"""Simulates continuous batching by discrete events: engines, a queue, graders and two waves.

It is pure: it uses neither a clock nor random numbers.

Between two completions the running sequences of an engine stay the same and their KV cache grows by one token each per
step, so the seconds of k steps are a closed formula and the simulator goes from event to event.
"""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

Policy = Literal["grpo", "sequential", "streamed", "early", "speculative", "fill"]
"""Says when the second wave of a group begins.

grpo: there is none. sequential: after all first waves. streamed: when the group's first wave is graded. early: when the
rollouts still missing cannot lift the group to tau. speculative: when `guess` rollouts have failed; it is taken back if
the group turns out not to be hard. fill: as soon as the group is certainly hard, and before that when an engine runs
fewer than `fill` sequences, the likeliest group first.
"""


@dataclass(frozen=True, slots=True)
class Cost:
    """Seconds of one decoding step: fixed + max(weights, per_sequence * n) + per_kv_token * tokens in the KV cache."""

    fixed: float
    weights: float
    per_sequence: float
    per_kv_token: float
    per_prompt_token: float = 0.0
    """Seconds of prefill, which each group costs once per engine, as with prefix caching."""
    padded: bool = False
    """The KV cache is a rectangle: n x the longest sequence, as in the local engine."""

    def seconds(self, steps: int, sequences: int, kv_tokens: int) -> float:
        """The seconds of `steps` steps, of which the first sees `kv_tokens` and each later one `sequences` more."""
        constant = self.fixed + max(self.weights, self.per_sequence * sequences)
        return steps * constant + self.per_kv_token * (steps * kv_tokens + sequences * steps * (steps - 1) / 2)

    def steps_within(self, seconds: float, sequences: int, kv_tokens: int) -> int:
        """Returns the fewest steps that take at least `seconds`."""
        constant = self.fixed + max(self.weights, self.per_sequence * sequences)
        a = self.per_kv_token * sequences / 2
        b = constant + self.per_kv_token * (kv_tokens - sequences / 2)
        if seconds <= 0:
            return 0
        root = seconds / b if a == 0 else (math.sqrt(b * b + 4 * a * seconds) - b) / (2 * a)
        return max(0, math.ceil(root - 1e-9))


@dataclass(frozen=True, slots=True)
class SimulatedGroup:
    """One prompt with (tokens, correct) of every rollout of both waves, all drawn before the simulation starts."""

    prompt_tokens: int
    native: tuple[tuple[int, bool], ...]
    rescue: tuple[tuple[int, bool], ...]


@dataclass(frozen=True, slots=True)
class Setting:
    cost: Cost
    engines: int = 1
    capacity: int = 256
    """The number of sequences that one engine decodes at once."""
    tau: float = 0.5
    grading_s: float = 0.0
    """Seconds between the end of a rollout and its verdict."""
    shared_queue: bool = False
    """True: all engines have one queue. False: group i belongs to engine i modulo `engines`."""
    guess: int = 1
    """Failures after which policy `speculative` starts a second wave."""
    fill: int = 0
    """Sequences below which policy `fill` starts second waves of undecided groups."""
    longest_first: bool = False
    """True: first waves wait in order of their true mean length, the best that knowing the prompts could give."""


@dataclass(frozen=True, slots=True)
class Outcome:
    seconds: float
    busy: tuple[float, ...]
    """Seconds in which each engine was busy."""
    first_wave_s: float
    """The time at which the last rollout of a first wave ended."""
    hard: int
    early: int
    """Second waves queued before their first wave was graded to the end."""
    wasted_tokens: int
    """Tokens generated for second waves that were taken back."""
    generated_tokens: int
    peak_kv_tokens: int
    """The highest number of tokens in the KV cache that any engine reached."""

    @property
    def idle_share(self) -> float:
        return 1 - sum(self.busy) / (len(self.busy) * self.seconds)


@dataclass(slots=True)
class _Sequence:
    group: int
    wave: int
    sample: int
    left: int
    context: int


@dataclass(slots=True)
class _Engine:
    cost: Cost
    clock: float = 0.0
    """The time, at a boundary between two steps."""
    busy: float = 0.0
    running: list[_Sequence] = field(default_factory=list)
    prefilled: set[tuple[int, int]] = field(default_factory=set)
    generated: int = 0
    peak: int = 0
    end: float | None = None
    """The value of `next_end`, until something changes."""

    @property
    def kv_tokens(self) -> int:
        contexts = [s.context for s in self.running]
        return len(contexts) * max(contexts, default=0) if self.cost.padded else sum(contexts)

    def next_end(self) -> float:
        if self.end is None:
            steps = min((s.left for s in self.running), default=0)
            spent = self.cost.seconds(steps, len(self.running), self.kv_tokens) if self.running else math.inf
            self.end = self.clock + spent
        return self.end

    def advance(self, steps: int) -> list[_Sequence]:
        """Returns what ended."""
        self.end = None
        spent = self.cost.seconds(steps, len(self.running), self.kv_tokens)
        self.clock, self.busy = self.clock + spent, self.busy + spent
        self.generated += steps * len(self.running)
        for sequence in self.running:
            sequence.left -= steps
            sequence.context += steps
        self.peak = max(self.peak, self.kv_tokens)
        ended = [s for s in self.running if s.left == 0]
        self.running = [s for s in self.running if s.left]
        return ended

    def catch_up(self, now: float) -> list[_Sequence]:
        """Moves the clock to the first boundary that is not before `now`."""
        if not self.running:
            self.clock = max(self.clock, now)
            return []
        steps = self.cost.steps_within(now - self.clock, len(self.running), self.kv_tokens)
        return self.advance(min(steps, min(s.left for s in self.running)))

    def admit(self, sequence: _Sequence, prompt_tokens: int) -> None:
        if (sequence.group, sequence.wave) not in self.prefilled:
            self.prefilled.add((sequence.group, sequence.wave))
            spent = prompt_tokens * self.cost.per_prompt_token
            self.clock, self.busy = self.clock + spent, self.busy + spent
        self.running.append(sequence)
        self.end = None


class Simulation:
    """Simulates the sampling of one step."""

    def __init__(self, groups: Sequence[SimulatedGroup], setting: Setting, policy: Policy):
        self.groups, self.setting, self.policy = groups, setting, policy
        self.engines = [_Engine(setting.cost) for _ in range(setting.engines)]
        self.queues: list[list[tuple]] = [[] for _ in range(1 if setting.shared_queue else setting.engines)]
        self.verdicts: list[tuple[float, int, int, bool]] = []
        """A heap: (time, group, wave, correct)."""
        self.passed, self.failed = [0] * len(groups), [0] * len(groups)
        self.second_tokens = [0] * len(groups)
        """Tokens of second-wave rollouts that have ended."""
        self.started: set[int] = set()
        """Groups whose second wave was queued."""
        self.held: list[int] = []
        self.first_left = sum(len(g.native) for g in groups)
        self.now = self.first_wave_s = 0.0
        self.count = self.early = self.wasted = 0

    def run(self) -> Outcome:
        for index in range(len(self.groups)):
            self._queue(index, 0)
        while True:
            self._dispatch()
            engine = min(self.engines, key=_Engine.next_end)
            verdict = self.verdicts[0][0] if self.verdicts else math.inf
            if min(engine.next_end(), verdict) == math.inf:
                break
            if verdict <= engine.next_end():
                self.now, group, wave, correct = heapq.heappop(self.verdicts)
                self._judged(group, wave, correct)
            else:
                self.now = engine.next_end()
                self._ended(engine, engine.advance(min(s.left for s in engine.running)))
        return Outcome(
            self.now,
            tuple(e.busy for e in self.engines),
            self.first_wave_s,
            sum(self._hard(len(g.native) - self.passed[i], i) for i, g in enumerate(self.groups)),
            self.early,
            self.wasted,
            sum(e.generated for e in self.engines),
            max(e.peak for e in self.engines),
        )

    def _queue(self, index: int, wave: int) -> None:
        group = self.groups[index]
        rollouts = group.rescue if wave else group.native
        mean = sum(tokens for tokens, _ in rollouts) / len(rollouts) if self.setting.longest_first else 0.0
        for sample, (tokens, _) in enumerate(rollouts):
            sequence = _Sequence(index, wave, sample, tokens, group.prompt_tokens)
            heapq.heappush(self.queues[index % len(self.queues)], (-wave, -mean, self.count, sequence))
            self.count += 1

    def _dispatch(self) -> None:
        """Gives waiting rollouts to the engine of their queue, or to the one with most room."""
        for place, queue in enumerate(self.queues):
            members = self.engines if self.setting.shared_queue else [self.engines[place]]
            while queue:
                engine = min(members, key=lambda e: len(e.running))
                if len(engine.running) >= self.setting.capacity:
                    break
                self._ended(engine, engine.catch_up(self.now))
                sequence = heapq.heappop(queue)[-1]
                engine.admit(sequence, self.groups[sequence.group].prompt_tokens)
            if self.policy == "fill" and min(len(e.running) for e in members) < min(
                self.setting.fill, self.setting.capacity
            ):
                self._guess(place)

    def _guess(self, place: int) -> None:
        """Queues the second wave of the undecided group of a queue with most failures and fewest successes."""
        mine = range(place, len(self.groups), len(self.queues))
        undecided = [i for i in mine if i not in self.started and not self._saved(i)]
        if undecided:
            index = max(undecided, key=lambda i: (self.failed[i] - self.passed[i], -i))
            self.started.add(index)
            self.early += 1
            self._queue(index, 1)
            self._dispatch()

    def _ended(self, engine: _Engine, sequences: list[_Sequence]) -> None:
        for s in sequences:
            group = self.groups[s.group]
            if s.wave == 0:
                self.first_left -= 1
                self.first_wave_s = max(self.first_wave_s, engine.clock)
            tokens, correct = (group.rescue if s.wave else group.native)[s.sample]
            self.second_tokens[s.group] += tokens * s.wave
            heapq.heappush(self.verdicts, (engine.clock + self.setting.grading_s, s.group, s.wave, correct))

    def _hard(self, failures: int, index: int) -> bool:
        size = len(self.groups[index].native)
        return (size - failures) / size < self.setting.tau

    def _judged(self, index: int, wave: int, correct: bool) -> None:
        if wave or self.policy == "grpo":
            return
        self.passed[index] += correct
        self.failed[index] += not correct
        size, failures = len(self.groups[index].native), self.failed[index]
        whole = self.passed[index] + failures == size
        certain = self._hard(failures, index)
        wanted = {
            "sequential": whole and certain,
            "streamed": whole and certain,
            "early": certain,
            "fill": certain,
            "speculative": failures >= self.setting.guess and not self._saved(index),
        }[self.policy]
        if wanted and index not in self.started:
            self.started.add(index)
            self.early += not whole
            if self.policy == "sequential":
                self.held.append(index)
            else:
                self._queue(index, 1)
        elif index in self.started and self._saved(index):
            self._take_back(index)
        if self.policy == "sequential" and sum(self.passed) + sum(self.failed) == sum(
            len(g.native) for g in self.groups
        ):
            for held in self.held:
                self._queue(held, 1)
            self.held = []

    def _saved(self, index: int) -> bool:
        """Returns whether the group can no longer be hard."""
        return not self._hard(len(self.groups[index].native) - self.passed[index], index)

    def _take_back(self, index: int) -> None:
        self.started.remove(index)
        self.wasted += self.second_tokens[index]
        for queue in self.queues:
            queue[:] = [entry for entry in queue if (entry[-1].group, entry[-1].wave) != (index, 1)]
            heapq.heapify(queue)
        for engine in self.engines:
            if any((s.group, s.wave) == (index, 1) for s in engine.running):
                self._ended(engine, engine.catch_up(self.now))
                mine = [s for s in engine.running if (s.group, s.wave) == (index, 1)]
                engine.running, engine.end = [s for s in engine.running if s not in mine], None
                self.wasted += sum(s.context - self.groups[index].prompt_tokens for s in mine)


def simulate(groups: Sequence[SimulatedGroup], setting: Setting, policy: Policy) -> Outcome:
    """Simulates sampling `groups`. `seconds` ends with the last verdict."""
    return Simulation(groups, setting, policy).run()

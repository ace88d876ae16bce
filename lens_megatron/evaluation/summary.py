"""Turns graded samples into results: per problem, per benchmark, by subject and level, and over all benchmarks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lens_megatron.evaluation.benchmarks import PAPER, EvalProblem
from lens_megatron.evaluation.journal import EvalSample
from lens_megatron.evaluation.statistics import (
    Estimate,
    average,
    borda_votes,
    estimate,
    majority,
    majority_at,
    pass_at,
)
from lens_megatron.evaluation.voting import CORRECT, GradedAnswer, group_answers
from lens_megatron.reward import GraderPool
from lens_megatron.reward.types import GradeStatus
from lens_megatron.seeds import derive


@dataclass(frozen=True, slots=True)
class ProblemResult:
    """What the samples of one problem came to."""

    id: str
    subject: str
    level: str
    samples: int
    correct: int
    truncated: int
    """Samples that were cut off at the most tokens."""
    unparsed: int
    timed_out: int
    """Samples whose grading failed: it took too long, or the grader crashed. They count as wrong."""
    tokens: int
    """Of all samples together."""
    groups: tuple[int, ...]
    """The answer that each sample votes for: 0 the expected one, -1 none. Empty with a single sample."""
    borda: float | None
    """The chance that Borda voting by self-certainty picks the expected answer; None without certainties."""

    @property
    def score(self) -> float:
        return self.correct / self.samples


@dataclass(frozen=True, slots=True)
class PartResult:
    """The accuracy on the problems of one subject or level."""

    name: str
    problems: int
    accuracy: Estimate


@dataclass(frozen=True, slots=True)
class BenchmarkResult:
    """The results on one benchmark. Shares and estimates are over problems."""

    name: str
    samples: int
    """Of every problem: the k of avg@k."""
    accuracy: Estimate
    """avg@k, with its interval over problems."""
    pass_at: tuple[float, ...]
    """pass@1 ... pass@k, unbiased."""
    majority_at: tuple[tuple[int, float], ...]
    """(k, maj@k) for powers of two and for all samples."""
    borda: float | None
    """Best of k by Borda voting with self-certainty."""
    truncated: float
    unparsed: float
    timed_out: float
    mean_tokens: float
    by_subject: tuple[PartResult, ...]
    by_level: tuple[PartResult, ...]
    problems: tuple[ProblemResult, ...]


@dataclass(frozen=True, slots=True)
class EvaluationResult:
    """All that an evaluation came to."""

    benchmarks: tuple[BenchmarkResult, ...]
    average: Estimate | None
    """The unweighted mean over the paper's benchmarks that are there; None without any."""


def problem_results(
    problems: Sequence[EvalProblem],
    samples: Mapping[tuple[str, str, int], EvalSample],
    count: int,
    graders: GraderPool | None,
) -> tuple[ProblemResult, ...]:
    """Counts the samples of each problem, and groups their answers where there are several.

    Args:
        samples: by their keys; they must hold `count` samples of every problem.
        graders: compare answers mathematically; None leaves the groups empty, as one sample does.

    Raises KeyError for a sample that is missing.
    """
    own = [[samples[p.benchmark, p.id, number] for number in range(count)] for p in problems]
    groups: list[tuple[int, ...]] = [()] * len(own)
    if graders is not None and count > 1:
        groups = group_answers(graders, [[GradedAnswer(s.status, s.extracted) for s in each] for each in own])
    return tuple(_problem_result(p, each, g) for p, each, g in zip(problems, own, groups, strict=True))


def _problem_result(problem: EvalProblem, samples: Sequence[EvalSample], groups: tuple[int, ...]) -> ProblemResult:
    statuses = [sample.status for sample in samples]
    certainties = [sample.certainty for sample in samples if sample.certainty is not None]
    votes = borda_votes(certainties) if groups and len(certainties) == len(samples) else None
    return ProblemResult(
        id=problem.id,
        subject=problem.subject,
        level=problem.level,
        samples=len(samples),
        correct=statuses.count(GradeStatus.CORRECT),
        truncated=sum(not sample.finished for sample in samples),
        unparsed=statuses.count(GradeStatus.UNPARSED),
        timed_out=statuses.count(GradeStatus.TIMEOUT) + statuses.count(GradeStatus.CRASH),
        tokens=sum(sample.tokens for sample in samples),
        groups=groups,
        borda=None if votes is None else majority(votes, groups, CORRECT),
    )


def summarise(name: str, problems: Sequence[ProblemResult], seed: int) -> BenchmarkResult:
    """Returns the result of a benchmark whose problems have the same number of samples."""
    samples = problems[0].samples
    total = samples * len(problems)
    borda = [problem.borda for problem in problems if problem.borda is not None]
    seed = derive(seed, "bootstrap", name)
    return BenchmarkResult(
        name=name,
        samples=samples,
        accuracy=estimate([problem.score for problem in problems], seed),
        pass_at=tuple(pass_at([problem.correct for problem in problems], samples).mean(0).tolist()),
        majority_at=_majorities(problems, samples, seed),
        borda=float(np.mean(borda)) if len(borda) == len(problems) else None,
        truncated=sum(problem.truncated for problem in problems) / total,
        unparsed=sum(problem.unparsed for problem in problems) / total,
        timed_out=sum(problem.timed_out for problem in problems) / total,
        mean_tokens=sum(problem.tokens for problem in problems) / total,
        by_subject=_parts(problems, [problem.subject for problem in problems], seed),
        by_level=_parts(problems, [problem.level for problem in problems], seed),
        problems=tuple(problems),
    )


def _majorities(problems: Sequence[ProblemResult], samples: int, seed: int) -> tuple[tuple[int, float], ...]:
    if samples == 1 or not all(problem.groups for problem in problems):
        return ()
    ks = sorted({2**power for power in range(2, samples.bit_length()) if 2**power <= samples} | {samples})
    return tuple(
        (k, float(np.mean([majority_at(problem.groups, CORRECT, k, seed + k) for problem in problems]))) for k in ks
    )


def _parts(problems: Sequence[ProblemResult], names: Sequence[str], seed: int) -> tuple[PartResult, ...]:
    """Returns the accuracy by name; nothing where the data has none, or one for all."""
    if len(set(names)) < 2:
        return ()
    parts = []
    for name in sorted(set(names)):
        scores = [problem.score for problem, own in zip(problems, names, strict=True) if own == name]
        parts.append(PartResult(name or "none", len(scores), estimate(scores, derive(seed, name))))
    return tuple(parts)


def combine(benchmarks: Sequence[BenchmarkResult], seed: int) -> EvaluationResult:
    """Returns the results with their average over the paper's benchmarks; other sets do not count in it."""
    paper = {benchmark.name for benchmark in PAPER}
    scores = [[problem.score for problem in result.problems] for result in benchmarks if result.name in paper]
    return EvaluationResult(tuple(benchmarks), average(scores, derive(seed, "average")) if scores else None)

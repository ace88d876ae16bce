"""`lens-eval regrade FILE ...`: grades the logs of other harnesses again, which tells grading from sampling."""

import json
import os
from argparse import ArgumentParser
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from lens_megatron.config import ConfigError
from lens_megatron.evaluation.regrading import LoggedSample, read_log
from lens_megatron.evaluation.sampling import for_graders
from lens_megatron.evaluation.statistics import estimate
from lens_megatron.files import write_atomically
from lens_megatron.reward import GraderPool
from lens_megatron.reward.extractors import EXTRACTORS
from lens_megatron.reward.types import Grade

SHOWN = 5
"""Disagreements of each kind that are printed."""


@dataclass(frozen=True, slots=True)
class Regraded:
    """A completion of another harness with this project's grade."""

    logged: LoggedSample
    grade: Grade

    @property
    def agrees(self) -> bool | None:
        """None where the log has no grade of this completion."""
        return None if self.logged.score is None else (self.logged.score >= 1) == self.grade.correct


def main(words: Sequence[str]) -> int:
    """Prints, for every file, both accuracies and where they disagree. Raises DataError for a file that is no log."""
    parser = ArgumentParser(prog="lens-eval regrade", description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="samples_*.jsonl of lm-evaluation-harness, "
                        "details_*.parquet of lighteval")  # fmt: skip
    parser.add_argument("--extractor", default="boxed", choices=sorted(EXTRACTORS), help="default: boxed")
    parser.add_argument("--grader", default="math_verify", help="as reward.grader (default: math_verify)")
    parser.add_argument("--timeout", type=float, default=5.0, metavar="S", help="seconds for one answer (default: 5)")
    parser.add_argument("--workers", type=int, default=min(4, os.cpu_count() or 1), help="grading processes")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="write every completion with both grades as JSON lines"
    )
    parsed = parser.parse_args(words)
    logs = [(path, read_log(path)) for path in parsed.files]
    try:
        graders = GraderPool(parsed.workers, parsed.timeout, parsed.grader)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    lines = []
    with graders:
        for path, samples in logs:
            found = regrade(samples, graders, parsed.extractor)
            print(describe(path.name, found))
            lines += [_line(path.name, each) for each in found]
    if parsed.out:
        try:
            write_atomically(parsed.out, "".join(lines))
        except OSError as error:
            raise ConfigError(f"--out {parsed.out}: {error.strerror}; choose another file") from error
    return 0


def regrade(samples: Sequence[LoggedSample], graders: GraderPool, extractor: str) -> list[Regraded]:
    """Grades completions as `lens-eval` does, in their order."""
    tickets = [graders.submit(for_graders(sample.text, extractor), sample.answer) for sample in samples]
    grades = graders.wait(tickets)
    return [Regraded(sample, grades[ticket]) for sample, ticket in zip(samples, tickets, strict=True)]


def describe(name: str, found: Sequence[Regraded]) -> str:
    """Returns a paragraph: our accuracy with its interval, the harness' own, and the disagreements both ways."""
    scores: dict[str, list[bool]] = {}
    for each in found:
        scores.setdefault(each.logged.problem, []).append(each.grade.correct)
    ours = estimate([sum(own) / len(own) for own in scores.values()], seed=0)
    lines = [
        f"{name}: {len(found)} completions of {len(scores)} problems; graded here {100 * ours.mean:.1f} % "
        f"[{100 * ours.low:.1f}, {100 * ours.high:.1f}]"
    ]
    statuses = Counter(str(each.grade.status) for each in found)
    lines.append("  " + ", ".join(f"{count} {status}" for status, count in statuses.most_common()))
    judged = [each for each in found if each.agrees is not None]
    if not judged:
        return "\n".join([*lines, "  the log has no grade of single completions to compare with"])
    theirs = sum((each.logged.score or 0) >= 1 for each in judged) / len(judged)
    apart = [each for each in judged if not each.agrees]
    lines.append(
        f"  the harness says {100 * theirs:.1f} %; grading differs on {len(apart)} of {len(judged)}: "
        f"{sum(each.grade.correct for each in apart)} correct only here, "
        f"{sum(not each.grade.correct for each in apart)} correct only there"
    )
    for correct in (True, False):
        for each in [each for each in apart if each.grade.correct is correct][:SHOWN]:
            where = "here " if correct else "there"
            lines.append(
                f"    correct only {where}: problem {each.logged.problem}, expected {each.logged.answer[:60]!r}, read "
                f"{(each.grade.extracted or 'nothing')[:60]!r} ({each.grade.detail or each.grade.status})"
            )
    return "\n".join(lines)


def _line(name: str, each: Regraded) -> str:
    grade = {"status": each.grade.status, "extracted": each.grade.extracted, "detail": each.grade.detail}
    return json.dumps({"file": name, **asdict(each.logged), **grade}) + "\n"

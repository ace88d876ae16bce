"""Finds training problems that stand in a benchmark, by shingles of 13 words.

A problem's shingles are all runs of 13 words in it; a shorter problem is one shingle. Words are runs of letters, digits
and underscores in lower case, so that layout, `$` and `\\\\left` beside a word change nothing. The share of a benchmark
problem's shingles that one training text holds says how much of it a model was trained on: as in the report of GPT-3
(arXiv 2005.14165, appendix C, 13-grams), but as a share instead of a single hit.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lens_megatron.evaluation.benchmarks import EvalProblem

WORDS = 13
THRESHOLD = 0.5
"""The share from which a problem counts as one that training has seen."""
_WORD = re.compile(r"\w+")


@dataclass(frozen=True, slots=True)
class Overlap:
    """A benchmark's problem, and the training text that holds most of it."""

    benchmark: str
    problem: str
    """The problem's id."""
    row: int
    """The training text, counted from 0."""
    share: float
    """Of the problem's shingles."""


def shingles(text: str, words: int = WORDS) -> set[str]:
    """Returns the runs of `words` words, joined by spaces; the whole text where it is shorter, nothing if empty."""
    found = _WORD.findall(text.lower())
    if len(found) <= words:
        return {" ".join(found)} if found else set()
    return {" ".join(found[place : place + words]) for place in range(len(found) - words + 1)}


def find_overlaps(
    training: Iterable[str], problems: Sequence[EvalProblem], threshold: float = THRESHOLD
) -> tuple[Overlap, ...]:
    """Returns the problems of which some training text holds at least `threshold`, each with the text that holds most.

    `training` is read once and not kept; memory grows with the benchmarks only.
    """
    owners: dict[str, list[int]] = {}
    sizes = []
    for number, problem in enumerate(problems):
        own = shingles(problem.problem)
        sizes.append(len(own))
        for shingle in own:
            owners.setdefault(shingle, []).append(number)
    best: dict[int, Overlap] = {}
    for row, text in enumerate(training):
        hits = Counter(number for shingle in shingles(text) for number in owners.get(shingle, ()))
        for number, count in hits.items():
            share = count / sizes[number]
            if share >= threshold and (number not in best or share > best[number].share):
                problem = problems[number]
                best[number] = Overlap(problem.benchmark, problem.id, row, share)
    return tuple(best[number] for number in sorted(best))


def summary_lines(
    found: Sequence[Overlap], problems: Sequence[EvalProblem], training: str, threshold: float = THRESHOLD
) -> list[str]:
    """Returns one line for each benchmark that overlaps; nothing where none does."""
    totals = Counter(problem.benchmark for problem in problems)
    lines = []
    for name, total in totals.items():
        own = [overlap for overlap in found if overlap.benchmark == name]
        if own:
            shown = ", ".join(f"{o.problem} (row {o.row}, {o.share:.0%})" for o in own[:3]) + ", ..." * (len(own) > 3)
            lines.append(
                f"{name}: {len(own)} of {total} problems share at least {threshold:.0%} of their {WORDS}-word shingles "
                f"with a text of {training}: {shown}"
            )
    return lines

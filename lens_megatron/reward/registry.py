"""Finds graders by their names, and adds the scores of several. adapters.py says how a user writes one."""

import difflib
import importlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lens_megatron.reward.adapters import Grader, adapt, number
from lens_megatron.reward.types import Submission, Verdict


def _math_verify() -> Grader:
    from lens_megatron.reward.math_verify_grader import grade_answer  # takes a second, and only workers need it

    return lambda submission: grade_answer(submission.completion, submission.answer)


def _math_verify_row() -> Grader:
    from lens_megatron.reward.tolerance import grade_by_row  # imports math_verify

    return grade_by_row


GRADERS: dict[str, Callable[[], Grader]] = {"math_verify": _math_verify, "math_verify_row": _math_verify_row}


@dataclass(frozen=True, slots=True)
class GraderSet:
    """The graders of a run, whose weighted scores are added."""

    names: tuple[str, ...]
    weights: tuple[float, ...]

    @property
    def only_math_verify(self) -> bool:
        """True where a verdict depends on the boxed answer and the expected answer alone."""
        return self.names == ("math_verify",)

    def to_argument(self) -> str:
        """Returns it as an argument of a command line."""
        return json.dumps([self.names, self.weights])

    @classmethod
    def from_argument(cls, argument: str) -> "GraderSet":
        names, weights = json.loads(argument)
        return cls(tuple(names), tuple(weights))


def choose(grader: str | Sequence[str], weights: Sequence[float] = ()) -> GraderSet:
    """Returns the graders with their weights, 1 each if there are none. Imports nothing.

    Raises:
        ValueError: a name is neither registered nor an import path, or the weights are no numbers, one per grader.
    """
    names = (grader,) if isinstance(grader, str) else tuple(grader)
    if not names:
        raise ValueError("reward.grader: the list is empty; name at least one grader, such as math_verify")
    for name in names:
        _check_name(name)
    if weights and len(weights) != len(names):
        raise ValueError(
            f"reward.weights has {len(weights)} numbers for {len(names)} graders (reward.grader={', '.join(names)}); "
            "give one for each, or leave it empty"
        )
    if not all(math.isfinite(weight) for weight in weights):
        raise ValueError(f"reward.weights {list(weights)}: give finite numbers")
    return GraderSet(names, tuple(weights) or (1.0,) * len(names))


def _check_name(name: str) -> None:
    if name in GRADERS or name.count(":") == 1:
        return
    near = difflib.get_close_matches(name, GRADERS, n=1)
    hint = f"; did you mean {near[0]}?" if near else f"; known: {', '.join(GRADERS)}"
    raise ValueError(f"reward.grader: unknown grader {name!r}{hint} (your own: module:function)")


def load(chosen: GraderSet) -> Callable[[Submission], Verdict]:
    """Returns one grader that stands for all of `chosen`. Whatever the import of a user's module raises passes through.

    The score is the weighted sum over the graders that apply. The first of them says whether the answer is correct.
    """
    graders = [GRADERS[name]() if name in GRADERS else _import(name) for name in chosen.names]

    def grade(submission: Submission) -> Verdict:
        verdicts = [_named(grader, name, submission) for grader, name in zip(graders, chosen.names, strict=True)]
        found = [(v, weight) for v, weight in zip(verdicts, chosen.weights, strict=True) if v is not None]
        if not found:
            raise ValueError("the grader returned None, and so does every other: none of them applies to this row")
        first, _ = found[0]
        score = number(sum(weight * verdict.score for verdict, weight in found))
        return Verdict(first.status, score, first.extracted, first.detail)

    def _named(grader: Grader, name: str, submission: Submission) -> Verdict | None:
        if len(graders) == 1:
            return grader(submission)
        try:
            return grader(submission)
        except Exception as error:
            raise RuntimeError(f"{name}: {type(error).__name__}: {error}") from error

    return grade


def _import(name: str) -> Grader:
    module, function = name.split(":")
    return adapt(getattr(importlib.import_module(module), function), name)

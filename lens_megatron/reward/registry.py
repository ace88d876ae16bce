"""Maps names to graders, functions (completion, answer, meta) -> Verdict. Users add theirs as `module:function`."""

import difflib
import importlib
import inspect
import reprlib
from collections.abc import Callable
from typing import Any

from lens_megatron.reward.types import GradeStatus, Verdict

Grader = Callable[[str, str, dict], Verdict]

MAX_SCORE = 1e12
"""The largest score: differences of scores are squared, and the squares are summed in single precision."""


def _math_verify() -> Grader:
    from lens_megatron.reward.math_verify_grader import grade_answer  # takes a second, and only workers need it

    return lambda completion, answer, meta: grade_answer(completion, answer)


GRADERS: dict[str, Callable[[], Grader]] = {"math_verify": _math_verify}


def check_name(name: str) -> None:
    """Raises ValueError for a name that is neither registered nor an import path. Imports nothing."""
    if name in GRADERS or name.count(":") == 1:
        return
    near = difflib.get_close_matches(name, GRADERS, n=1)
    hint = f"; did you mean {near[0]}?" if near else f"; known: {', '.join(GRADERS)}"
    raise ValueError(f"reward.grader: unknown grader {name!r}{hint} (your own: module:function)")


def load_grader(name: str) -> Grader:
    """Returns the grader. Raises ValueError for an unknown name, ImportError or AttributeError for an invalid path."""
    check_name(name)
    if name in GRADERS:
        return GRADERS[name]()
    module, function = name.split(":")
    return _adapt(getattr(importlib.import_module(module), function))


def _adapt(function: Callable) -> Grader:
    """Makes a grader of verl's compute_score or TRL's reward function, which parameter names distinguish."""
    names = list(inspect.signature(function).parameters)
    if "completions" in names:
        return lambda completion, answer, meta: _scored(
            _only(
                function(
                    prompts=[meta.get("prompt", "")],
                    completions=[completion],
                    answer=[answer],
                    **{k: [v] for k, v in meta.items() if k != "prompt"},
                )
            )
        )
    if "solution_str" in names:
        return lambda completion, answer, meta: _scored(
            function(
                data_source=meta.get("data_source", ""),
                solution_str=completion,
                ground_truth=answer,
                extra_info=meta,
            )
        )
    raise ValueError(
        f"grader {function.__name__}({', '.join(names)}): expected verl's (data_source, solution_str, ground_truth, "
        "extra_info) or TRL's (prompts, completions, **columns)"
    )


def _only(scores: Any) -> Any:
    """Returns the score of the only completion that was given."""
    if isinstance(scores, str | bytes | dict) or not hasattr(scores, "__getitem__") or len(scores) != 1:
        raise TypeError(f"the grader returned {reprlib.repr(scores)} for one completion; return a list of one number")
    return scores[0]


def _scored(result: Any) -> Verdict:
    """Makes a verdict of a custom score; it is correct if `acc` says so, or without `acc` if the score is 1 or more."""
    if isinstance(result, dict):
        if "score" not in result:
            raise TypeError(f"the grader returned {reprlib.repr(result)}; return a number, or a dict with 'score'")
        score = _number(result["score"])
        correct = bool(_number(result.get("acc", score >= 1)))
    else:
        score = _number(result)
        correct = score >= 1
    return Verdict(GradeStatus.CORRECT if correct else GradeStatus.WRONG, score)


def _number(value: Any) -> float:
    """Reads a score: a number of Python's or NumPy's, or a tensor of one element. Raises ValueError for others."""
    number = None
    if not isinstance(value, str | bytes | bytearray):
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError, RuntimeError):
            pass  # a tensor of several elements raises RuntimeError
    if number is None or not abs(number) <= MAX_SCORE:
        raise ValueError(
            f"the grader returned {reprlib.repr(value)}; return a finite number of at most {MAX_SCORE:g} in magnitude"
        )
    return number

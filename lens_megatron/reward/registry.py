"""Name -> grader: a function (completion, answer, meta) -> Verdict. Users add theirs as `module:function`."""

import difflib
import importlib
import inspect
from collections.abc import Callable

from lens_megatron.reward.types import GradeStatus, Verdict

Grader = Callable[[str, str, dict], Verdict]


def _math_verify() -> Grader:
    from lens_megatron.reward.math_verify_grader import grade_answer  # a second of imports, wanted in workers only

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
    """Raises ValueError for an unknown name, ImportError or AttributeError for a path that leads nowhere."""
    check_name(name)
    if name in GRADERS:
        return GRADERS[name]()
    module, function = name.split(":")
    return _adapt(getattr(importlib.import_module(module), function))


def _adapt(function: Callable) -> Grader:
    """Accepts verl's compute_score and TRL's reward function, told apart by their parameters' names."""
    names = list(inspect.signature(function).parameters)
    if "completions" in names:
        return lambda completion, answer, meta: _scored(
            function(
                prompts=[meta.get("prompt", "")],
                completions=[completion],
                answer=[answer],
                **{k: [v] for k, v in meta.items() if k != "prompt"},
            )[0]
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


def _scored(result: float | dict) -> Verdict:
    """A custom score; `acc` says what counts as correct, else a score of 1 or more."""
    if isinstance(result, dict):
        score = float(result["score"])
        correct = bool(result.get("acc", score >= 1))
    else:
        score = float(result)
        correct = score >= 1
    return Verdict(GradeStatus.CORRECT if correct else GradeStatus.WRONG, score)

"""Makes graders of reward functions that were written for verl or for TRL; parameter names tell which.

A function of yours stands in any module on PYTHONPATH and is named by `reward.grader=module:function`. It is one of

    def compute_score(data_source, solution_str, ground_truth, extra_info=None):    # verl's
        return float(solution_str.strip() == ground_truth)              # or {"score": 0.5, "acc": True}

    def brevity(prompts, completions, **columns):                       # TRL's
        return [1.0 if len(completion) < 200 else None for completion in completions]

verl's gets the row's `data_source` (else the name of the dataset), the completion, the value of the row's
`reward_model.ground_truth` as it is (else the answer), and the row's `extra_info` (else all of its columns). A dict has
the reward as `score`, and may have what decides whether the answer is correct as `acc`.

TRL's gets batches of one: the prompt, the completion, its tokens as `completion_ids`, and every column of the row as a
list. Where the data holds conversations, prompt and completion are lists of messages, else both are text; neither
contains `data.instruction`. `log_extra` and `log_metric` drop what they are given, and there is no `trainer_state`. Of
these it gets what it has parameters for, all with `**columns`. None instead of a number means that the function does
not apply to this row.

Both may be `async`. An answer is correct if `acc` says so, without `acc` if its score is 1 or more. `reward.rules` and
`reward.success_threshold` act on the result.
"""

import asyncio
import inspect
import reprlib
from collections.abc import Awaitable, Callable
from typing import Any

from lens_megatron.reward import rows
from lens_megatron.reward.types import GradeStatus, Submission, Verdict

Grader = Callable[[Submission], Verdict | None]
"""None means that it does not apply to the row."""

MAX_SCORE = 1e12
"""The largest score: differences of scores are squared, and the squares are summed in single precision."""

_NO_COLUMNS = ("prompt", "prompts", "completion", "completions", "completion_ids")
"""Columns that TRL does not pass on, since the trainer gives what they are called after."""


def adapt(function: Callable[..., Any], name: str) -> Grader:
    """Makes a grader of a reward function. Raises ValueError for a function with another signature."""
    parameters = inspect.signature(function).parameters
    arguments = _of_trl if "completions" in parameters else _of_verl if "solution_str" in parameters else None
    if arguments is None:
        raise ValueError(
            f"grader {name}({', '.join(parameters)}): expected verl's (data_source, solution_str, ground_truth, "
            "extra_info) or TRL's (prompts, completions, **columns)"
        )
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    read = _only if arguments is _of_trl else _scored
    runner = asyncio.Runner()  # one event loop for all calls, to which a function may bind its connections

    def grade(submission: Submission) -> Verdict | None:
        given = arguments(submission)
        result = function(**{key: value for key, value in given.items() if takes_all or key in parameters})
        return read(runner.run(_finished(result)) if inspect.isawaitable(result) else result)

    return grade


async def _finished(result: Awaitable[Any]) -> Any:
    return await result


def _of_verl(submission: Submission) -> dict[str, Any]:
    facts = submission.facts
    ground_truth: Any = submission.answer
    extra: Any = {}
    if facts.record:
        row = rows.decode(facts.record)
        ground_truth, extra = row.ground_truth, row.columns.get("extra_info")
        extra = row.columns if extra is None else extra
    return {
        "data_source": facts.source,
        "solution_str": submission.completion,
        "ground_truth": ground_truth,
        "extra_info": extra,
    }


def _of_trl(submission: Submission) -> dict[str, Any]:
    facts, completion = submission.facts, submission.completion
    prompt: Any = ""
    answer: Any = completion
    columns: dict[str, Any] = {"answer": submission.answer}
    if facts.record:
        row = rows.decode(facts.record)
        columns |= row.columns
        prompt = list(row.messages) if row.conversational else rows.user_text(row.messages)
        answer = [{"role": "assistant", "content": completion}] if row.conversational else completion
    given = {key: [value] for key, value in columns.items() if key not in _NO_COLUMNS}
    return {
        **given,
        "prompts": [prompt],
        "completions": [answer],
        "completion_ids": [list(facts.token_ids)],
        "log_extra": _drop,
        "log_metric": _drop,
    }


def _drop(name: str, value: Any) -> None:
    """Stands for TRL's functions that log what a reward function has found out."""


def _only(scores: Any) -> Verdict | None:
    """Makes a verdict of the score of the only completion that was given; None where the function does not apply."""
    if isinstance(scores, str | bytes | dict) or not hasattr(scores, "__getitem__") or len(scores) != 1:
        raise TypeError(f"the grader returned {reprlib.repr(scores)} for one completion; return a list of one number")
    return None if scores[0] is None else _scored(scores[0])


def _scored(result: Any) -> Verdict:
    """Makes a verdict of a custom score; it is correct if `acc` says so, or without `acc` if the score is 1 or more."""
    if isinstance(result, dict):
        if "score" not in result:
            raise TypeError(f"the grader returned {reprlib.repr(result)}; return a number, or a dict with 'score'")
        score = number(result["score"])
        correct = bool(number(result.get("acc", score >= 1)))
    else:
        score = number(result)
        correct = score >= 1
    return Verdict(GradeStatus.CORRECT if correct else GradeStatus.WRONG, score)


def number(value: Any) -> float:
    """Reads a score: a number of Python's or NumPy's, or a tensor of one element. Raises ValueError for others."""
    found = None
    if not isinstance(value, str | bytes | bytearray):
        try:
            found = float(value)
        except (TypeError, ValueError, OverflowError, RuntimeError):
            pass  # a tensor of several elements raises RuntimeError
    if found is None or not abs(found) <= MAX_SCORE:
        raise ValueError(
            f"the grader returned {reprlib.repr(value)}; return a finite number of at most {MAX_SCORE:g} in magnitude"
        )
    return found

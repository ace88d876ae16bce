r"""Makes word problems for the language model: the demo's generator, with facts in words and solutions in sentences.

    stream (tools/demo) -> WordProblem -> cold_start.jsonl (clean, solved)
                                      \-> train.jsonl, eval.jsonl (with distractors)

With facts in words and distractors in digits, only the noise shares the class of tokens that the answers are made of.
With digits in both, the scores were measured to find the noise no better than chance.
"""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal, get_args

from lens_megatron.tools.demo.problems import Problem, stream
from lens_megatron.tools.llm.folders import LlmError, LlmFolder, whole_folder

Facts = Literal["words", "digits"]
"""How the numbers of a problem's own sentences are written. Distractors always have digits."""
FACTS: tuple[Facts, ...] = get_args(Facts)

LLM_INSTRUCTION = "Answer in \\boxed{}."
"""The text that the trainer appends to a problem, after a newline (configs/llm.yaml)."""
SOLUTIONS, TRAIN_PROBLEMS, EVAL_PROBLEMS = 800, 2000, 64
NOISE_SHARES = {0: 1, 1: 1, 2: 1, 3: 1}
"""Number of distractors -> weight, in training and evaluation data."""
_SOLUTION_SEED, _DATA_SEED, _HELD_OUT_SEED = 1, 0, 2

Span = tuple[int, int]
_SIGNS = {"add": "+", "sub": "-", "mul": "*"}
_UNITS = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"),
)
_TENS = ("", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")


@dataclass(frozen=True, slots=True)
class WordProblem:
    r"""One problem as the language model reads it.

    Example: WordProblem("Tom has nine nuts (see page 7). Tom lost four of them. How many ...?", "Tom has nine nuts.
    Tom lost ...", "9 - 4 = 5, so the answer is \boxed{5}.", "5", ((17, 30),), "sub").
    """

    text: str
    core: str
    """The same text without its distractors."""
    solution: str
    answer: str
    noise: tuple[Span, ...]
    """The characters [start, end) of `text` that its distractors are."""
    kind: str
    """Operations in order, joined by "_"."""


@dataclass(frozen=True, slots=True)
class DataSummary:
    """What `data/data.json` says of the files beside it."""

    facts: Facts
    cold_start: int
    train: int
    eval: int


def number_in_words(number: int) -> str:
    """Spells 0..99: 7 -> "seven", 42 -> "forty-two". Raises ValueError for other numbers."""
    if not 0 <= number <= 99:
        raise ValueError(f"expected a number from 0 to 99, got {number}")
    if number < len(_UNITS):
        return _UNITS[number]
    tens, unit = divmod(number, 10)
    return _TENS[tens] + (f"-{_UNITS[unit]}" if unit else "")


def spell_facts(text: str, noise: tuple[Span, ...]) -> tuple[str, tuple[Span, ...]]:
    """Writes the numbers outside of `noise` in words; returns the text, and `noise` as spans of it.

    Example: ("Tom has 9 nuts (note 7).", ((14, 23),)) -> ("Tom has nine nuts (note 7).", ((17, 26),)).
    """
    parts, spans, end = [], [], 0
    for start, stop in (*noise, (len(text), len(text))):
        parts.append(re.sub(r"\d+", lambda found: number_in_words(int(found[0])), text[end:start]))
        before = sum(map(len, parts))
        parts.append(text[start:stop])
        spans.append((before, before + stop - start))
        end = stop
    return "".join(parts), tuple(spans[:-1])


def solution_in_sentences(kind: str, numbers: tuple[int, ...]) -> str:
    r"""Returns a worked solution.

    Example: ("mul_sub", (3, 4, 2)) -> "3 * 4 = 12 and 12 - 2 = 10, so the answer is \boxed{10}."
    """
    value, steps = numbers[0], []
    for operation, number in zip(kind.split("_"), numbers[1:], strict=True):
        result = {"add": value + number, "sub": value - number, "mul": value * number}[operation]
        steps.append(f"{value} {_SIGNS[operation]} {number} = {result}")
        value = result
    return f"{' and '.join(steps)}, so the answer is \\boxed{{{value}}}."


def word_problem(problem: Problem, facts: Facts) -> WordProblem:
    """Returns a problem of the demo's generator in the form asked for."""
    text, core, noise = problem.problem, problem.core, problem.noise_spans
    if facts == "words":
        (text, noise), (core, _) = spell_facts(text, noise), spell_facts(core, ())
    solution = solution_in_sentences(problem.kind, problem.numbers)
    return WordProblem(text, core, solution, problem.answer, noise, problem.kind)


def clean_problems(facts: Facts) -> Iterator[WordProblem]:
    """Yields endless problems without distractors, for the cold start. Their cores are never held out."""
    return (word_problem(p, facts) for p in stream("train", _SOLUTION_SEED, {0: 1}))


def held_out_problems(facts: Facts, distractors: int) -> Iterator[WordProblem]:
    """Yields endless problems with this number of distractors, whose cores no training data has."""
    return (word_problem(p, facts) for p in stream("eval", _HELD_OUT_SEED, {distractors: 1}))


def write_data(folder: LlmFolder, facts: Facts) -> None:
    """Writes `data/`: cold_start.jsonl, train.jsonl, eval.jsonl and data.json."""
    with whole_folder(folder.data) as target:
        _write(target / "cold_start.jsonl", islice(clean_problems(facts), SOLUTIONS), solved=True)
        for split, count in (("train", TRAIN_PROBLEMS), ("eval", EVAL_PROBLEMS)):
            problems = (word_problem(p, facts) for p in stream(split, _DATA_SEED, dict(NOISE_SHARES)))
            _write(target / f"{split}.jsonl", islice(problems, count), solved=False)
        summary = {"facts": facts, "cold_start": SOLUTIONS, "train": TRAIN_PROBLEMS, "eval": EVAL_PROBLEMS}
        (target / "data.json").write_text(json.dumps(summary) + "\n")


def read_summary(folder: LlmFolder) -> DataSummary | None:
    """Returns what `data/` holds, or None where it is not there. Raises LlmError for a summary that is damaged."""
    file = folder.data / "data.json"
    try:
        return DataSummary(**json.loads(file.read_text()))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise LlmError(f"{file} is damaged ({error}); remove {folder.data}, and run data again") from error


def read_solutions(folder: LlmFolder) -> list[tuple[str, str]]:
    """Returns (problem, solution) of every row of cold_start.jsonl. Raises LlmError where it is missing or damaged."""
    file = folder.data / "cold_start.jsonl"
    try:
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        return [(row["problem"], row["solution"]) for row in rows]
    except FileNotFoundError:
        raise LlmError(f"{file} is not there; run python -m lens_megatron.llm data --out {folder.root} first") from None
    except (ValueError, KeyError, TypeError) as error:
        raise LlmError(f"{file} is damaged ({error}); remove {folder.data}, and run data again") from error


def _write(path: Path, problems: Iterable[WordProblem], *, solved: bool) -> None:
    """Writes rows for the trainer, with noise for `data.noise_key`, or rows with solutions for the cold start."""
    with path.open("w", encoding="utf-8") as file:
        for i, p in enumerate(problems):
            row: dict[str, object] = {"id": f"{path.stem}-{i}", "problem": p.text, "answer": p.answer}
            row |= {"solution": p.solution} if solved else {"noise": p.noise, "kind": p.kind, "core": p.core}
            file.write(json.dumps(row) + "\n")

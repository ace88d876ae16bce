r"""Grades the expected answers of benchmarks against themselves and against equal and unequal forms of themselves.

    python -m benchmarks.grading --data FOLDER --out benchmarks/results/grading_cpu_202611.json

FOLDER holds one `.jsonl` file for each benchmark, with a column `answer` and perhaps `error` and `relative_tolerance`.
The table says what share of the answers the grader reads, and for each form in how many of the answers that have it the
grader decides rightly. No answer and no problem is written.
"""

import argparse
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from importlib.metadata import version
from pathlib import Path

from lens_megatron.files import write_atomically
from lens_megatron.reward import AnswerFacts, GraderPool
from lens_megatron.reward.boxed import normalise, plain_number
from lens_megatron.reward.extractors import in_box
from lens_megatron.reward.math_verify_grader import is_read
from lens_megatron.reward.rows import DataRow, encode

Form = Callable[[str], str | None]
"""Rewrites an answer; None where the form does not apply to it."""

_FRACTION = re.compile(r"(-?)\\[dt]?frac\s?\{([0-9]+)\}\s?\{([0-9]+)\}")
_SCIENTIFIC = re.compile(r"(-?[0-9.]+)\s*\\times\s*10\^\{?(-?[0-9]+)\}?")
_LIST = re.compile(r"[^()\[\]{}$]*,[^()\[\]{}$]*")
TIMEOUT_S = 10.0


def _dfrac(answer: str) -> str | None:
    return answer.replace("\\frac", "\\dfrac") if "\\frac" in answer else None


def _slash(answer: str) -> str | None:
    match = _FRACTION.fullmatch(answer)
    return f"{match[1]}{match[2]}/{match[3]}" if match else None


def _decimal(answer: str) -> str | None:
    r"""Writes `\frac{1}{4}` as `0.25`; None where the decimal does not end within 6 places."""
    match = _FRACTION.fullmatch(answer)
    if match is None or not int(match[3]):
        return None
    value = Fraction(int(match[2]), int(match[3]))
    return f"{match[1]}{float(value)}" if 10**6 % value.denominator == 0 else None


def _exponent(answer: str) -> str | None:
    match = _SCIENTIFIC.fullmatch(answer)
    return f"{match[1]}e{match[2]}" if match else None


def _reversed_list(answer: str) -> str | None:
    items = answer.split(",")
    is_list = _LIST.fullmatch(answer) and len(items) > 1 and plain_number(answer) is None
    return ", ".join(item.strip() for item in reversed(items)) if is_list else None


def _with_unit(answer: str) -> str | None:
    return rf"{answer}\text{{ units}}" if plain_number(answer) is not None else None


def _assigned(answer: str) -> str | None:
    return f"x = {answer}" if plain_number(answer) is not None or _FRACTION.fullmatch(answer) else None


def _thousands(answer: str) -> str | None:
    return f"{int(answer):,}" if re.fullmatch(r"[0-9]{4,15}", answer) else None


def _next_number(answer: str) -> str | None:
    value = plain_number(answer)
    return None if value is None else str(value + 1)


def _wrong_sign(answer: str) -> str | None:
    match = _FRACTION.fullmatch(answer)
    return (answer[1:] if match[1] else "-" + answer) if match and int(match[2]) else None


def _shorter_list(answer: str) -> str | None:
    turned = _reversed_list(answer)
    items = [] if turned is None else [normalise(item) for item in turned.split(",")]
    return items[0] if len(set(items)) > 1 else None


EQUAL: Mapping[str, Form] = {
    "itself": lambda answer: answer,
    "in `$`": lambda answer: None if "$" in answer else f"${answer}$",
    "`\\dfrac`": _dfrac,
    "a/b": _slash,
    "decimal": _decimal,
    "1e5": _exponent,
    "list reversed": _reversed_list,
    "unit behind": _with_unit,
    "x = ...": _assigned,
    "1,000": _thousands,
}
UNEQUAL: Mapping[str, Form] = {"number + 1": _next_number, "other sign": _wrong_sign, "one of a list": _shorter_list}


@dataclass(frozen=True, slots=True)
class Tally:
    """How often the grader decided rightly."""

    right: int
    total: int

    def __str__(self) -> str:
        return f"{self.right}/{self.total}" if self.total else "-"


@dataclass(frozen=True, slots=True)
class BenchmarkGrading:
    """What was found for one benchmark."""

    name: str
    answers: int
    read: Tally
    """Answers that are read as numbers or mathematics; the others can be compared as text only."""
    equal: Mapping[str, Tally]
    """By form, of the answers that have the form."""
    unequal: Mapping[str, Tally]


def examine(path: Path, pool: GraderPool) -> BenchmarkGrading:
    """Grades all forms of the answers of one file. Raises ValueError for a row without an answer."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if any(not isinstance(row.get("answer"), str) or not row["answer"] for row in rows):
        raise ValueError(f"{path}: every row needs a text in the column answer")
    tables = []
    for forms, expected in ((EQUAL, True), (UNEQUAL, False)):
        tables.append({name: _grade_form(form, rows, expected, pool) for name, form in forms.items()})
    read = Tally(sum(is_read(row["answer"]) for row in rows), len(rows))
    return BenchmarkGrading(path.stem, len(rows), read, *tables)


def _grade_form(form: Form, rows: list[dict], expected: bool, pool: GraderPool) -> Tally:
    tickets = []
    for row in rows:
        box = form(row["answer"])
        if box is not None:
            facts = AnswerFacts(record=encode(DataRow((), False, row["answer"], _tolerances(row))))
            tickets.append(pool.submit(in_box(box), row["answer"], facts=facts))
    grades = pool.wait(tickets).values()
    return Tally(sum(found.correct is expected and not found.failed for found in grades), len(tickets))


def _tolerances(row: dict) -> dict[str, object]:
    return {key: row[key] for key in ("error", "relative_tolerance") if row.get(key) is not None}


def table(found: list[BenchmarkGrading]) -> str:
    """Returns the results as a Markdown table, with a row for every benchmark."""
    names = [*EQUAL, *(f"not: {name}" for name in UNEQUAL)]
    lines = [["benchmark", "read", *names], ["---"] * (len(names) + 2)]
    for one in found:
        lines.append([one.name, str(one.read), *map(str, [*one.equal.values(), *one.unequal.values()])])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def to_json(found: list[BenchmarkGrading]) -> str:
    """Returns counts and versions as JSON: right and total for each form of each benchmark."""
    versions = {name: version(name) for name in ("math-verify", "latex2sympy2_extended", "sympy")}
    results = [
        {
            "benchmark": one.name,
            "answers": one.answers,
            "read": one.read.right,
            "equal": {name: [tally.right, tally.total] for name, tally in one.equal.items()},
            "unequal": {name: [tally.right, tally.total] for name, tally in one.unequal.items()},
        }
        for one in found
    ]
    return json.dumps({"command": "python -m benchmarks.grading", "versions": versions, "results": results}, indent=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of .jsonl files, one for each benchmark")
    parser.add_argument("--out", type=Path, help="file for the counts as JSON")
    arguments = parser.parse_args()
    paths = sorted(arguments.data.glob("*.jsonl"))
    if not paths:
        raise SystemExit(f"{arguments.data}: there are no .jsonl files here; give the folder that holds them")
    with GraderPool(1, TIMEOUT_S, grader="math_verify_row") as pool:
        found = [examine(path, pool) for path in paths]
    print(table(found))
    if arguments.out:
        write_atomically(arguments.out, to_json(found) + "\n")


if __name__ == "__main__":
    main()

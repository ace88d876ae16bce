"""Benchmarks are found, read and told apart; generated problems have the answers that a second computation gives."""

import json
import re
from fractions import Fraction
from itertools import product
from pathlib import Path

import pytest
import sympy

from lens_megatron.config import ConfigError
from lens_megatron.data.datasets import DataError
from lens_megatron.evaluation.benchmarks import (
    PAPER,
    DataPlaces,
    EvalProblem,
    canonical_name,
    digest,
    in_paper_order,
    read_problems,
    title_of,
)
from lens_megatron.evaluation.generated import generate
from lens_megatron.reward import grade


def write(path: Path, *rows: dict) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_the_papers_columns():
    titles = [benchmark.title for benchmark in PAPER]
    assert titles == ["MATH500", "AMC23", "AIME24", "AIME25", "GaoKao2023EN", "Minerva", "OlympiadBench"]
    assert in_paper_order(["mine", "minerva", "math500"]) == ["math500", "minerva", "mine"]
    assert canonical_name("minerva_math") == "minerva" and canonical_name("mine") == "mine"
    assert title_of("amc23") == "AMC23" and title_of("mine") == "mine"


def test_data_is_found_by_name_then_in_folders_then_on_the_hub(tmp_path: Path):
    file = write(tmp_path / "minerva_math.jsonl", {"problem": "p", "answer": "1"})
    places = DataPlaces.parse([str(tmp_path), "aime_2024=elsewhere.jsonl"])
    assert places.find("minerva") == file
    assert places.find("aime24") == "elsewhere.jsonl"
    assert places.find("math500") == "HuggingFaceH4/MATH-500:test"
    with pytest.raises(ConfigError, match=r"olympiadbench: no data: looked for .*olympiadbench.jsonl; give --data"):
        places.find("olympiadbench")
    with pytest.raises(ConfigError, match=r"aime26: no data: .* \(benchmarks with names: math500, amc23"):
        places.find("aime26")
    with pytest.raises(ConfigError, match="--data nowhere: no such folder"):
        DataPlaces.parse(["nowhere"])


def test_rows_give_ids_subjects_and_levels(tmp_path: Path):
    rows = (
        {"problem": "1+1?", "answer": "2", "unique_id": "a", "subject": "Algebra", "level": 2},
        {"problem": [{"role": "system", "content": "s"}, {"role": "user", "content": "2+2?"}], "answer": 4.0},
    )
    first, second = read_problems("mine", write(tmp_path / "mine.jsonl", *rows))
    assert first == EvalProblem("mine", "a", 0, "1+1?", "2", "Algebra", "2", first.record)
    assert (second.id, second.problem, second.answer, second.subject) == ("1", "2+2?", "4", "")
    assert json.loads(first.record)["columns"]["unique_id"] == "a"
    assert len(read_problems("mine", str(tmp_path / "mine.jsonl"), limit=1)) == 1


def test_rows_that_are_no_benchmark_are_refused(tmp_path: Path):
    twice = write(tmp_path / "twice.jsonl", *({"id": "a", "problem": p, "answer": "1"} for p in "pq"))
    with pytest.raises(DataError, match="2 rows have the id 'a'"):
        read_problems("twice", twice)
    talk = [{"role": role, "content": "x"} for role in ("user", "assistant", "user")]
    with pytest.raises(DataError, match="talk.jsonl:1: 3 turns; a problem of a benchmark is one turn"):
        read_problems("talk", write(tmp_path / "talk.jsonl", {"problem": talk, "answer": "1"}))


def test_the_digest_sees_every_change(tmp_path: Path):
    problems = generate(0, 2)
    other = (problems[1], problems[0])
    assert digest(problems) == digest(generate(0, 2)) != digest(other)


def test_generated_problems_are_a_function_of_the_seed():
    assert generate(3, 50) == generate(3, 80)[:50]
    assert len({problem.problem for problem in generate(3, 300)}) == 300
    assert len({p.problem for p in generate(3, 200)} & {p.problem for p in generate(4, 200)}) < 10
    cells = {(problem.subject, problem.level) for problem in generate(3, 36)}
    assert len(cells) == 6 * 3  # one round has every kind at every level


def numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"-?\d+", text.replace("x^2", "x"))]


def solve(text: str) -> sympy.Expr | None:
    """The answer by another way than the generator's: symbols, or counting one by one; None where too slow."""
    x, y = sympy.symbols("x y")
    formulas = [re.sub(r"(\d)([xy])", r"\1*\2", f.replace("^", "**")) for f in re.findall(r"\$([^$]*)\$", text)]
    sides = [[sympy.sympify(side) for side in f.split("=")] for f in formulas if "=" in f]
    if text.startswith("Solve"):
        return sympy.solve(sympy.Eq(*sides[0]), x)[0]
    if text.startswith("The numbers"):
        found = sympy.solve([sympy.Eq(*side) for side in sides], [x, y])
        return found[x] - found[y]
    if "complex roots" in text:
        power = 2 if "squares" in text else 3 if "cubes" in text else 1
        roots = sympy.roots(sympy.Poly(sympy.sympify(formulas[0]), x))
        return sympy.simplify(sum(times * root**power for root, times in roots.items()))
    values = numbers(text)
    if "remainder" in text:
        return sympy.Integer(values[0] ** values[1] % values[2])
    if "positive divisors" in text:
        return sympy.divisor_count(values[0])
    if "not exceeding" in text:
        top, a, b = values
        hits = [(n % a == 0) + (n % b == 0) for n in range(1, top + 1)]
        return sympy.Integer(sum(h == 1 if "exactly" in text else h > 0 for h in hits))
    if "arithmetic sequence" in text:
        count, first, step = values
        return sympy.Integer(sum(first + i * step for i in range(count)))
    if "dice" in text and values[2] ** values[0] < 1000:
        dice, _, sides_, total = values
        rolls = list(product(range(1, sides_ + 1), repeat=dice))
        return sympy.Rational(sum(sum(roll) == total for roll in rolls), len(rolls))
    return None


def test_answers_agree_with_a_second_computation():
    checked = 0
    for problem in generate(7, 40):
        expected = solve(problem.problem)
        if expected is not None:
            fraction = re.sub(r"\\frac\{(\d+)\}\{(\d+)\}", r"\1/\2", problem.answer)
            assert sympy.Rational(Fraction(fraction)) == expected, problem.problem
            checked += 1
    assert checked > 20


def test_answers_grade_as_themselves():
    problems = generate(5, 36)
    grades = grade([f"\\boxed{{{p.answer}}}" for p in problems], [p.answer for p in problems], workers=1)
    assert all(found.correct for found in grades)

"""The benchmark of graders: its forms of answers, and a run on a small folder."""

import json
import subprocess
import sys
from pathlib import Path

from benchmarks.grading import EQUAL, UNEQUAL, Tally

ROOT = Path(__file__).resolve().parents[1]


def test_forms_of_answers_worked_by_hand():
    forms = {**EQUAL, **UNEQUAL}
    given = {
        "decimal": (r"-\frac{3}{8}", "-0.375"),
        "a/b": (r"\frac{3}{8}", "3/8"),
        "1e5": (r"4.5 \times 10^{-3}", "4.5e-3"),
        "list reversed": ("1, x,3", "3, x, 1"),
        "1,000": ("12345", "12,345"),
        "number + 1": ("-1.5", "-0.5"),
        "other sign": (r"-\frac{1}{2}", r"\frac{1}{2}"),
        "one of a list": ("1, 2", "2"),
    }
    assert {name: forms[name](answer) for name, (answer, _) in given.items()} == {
        name: form for name, (_, form) in given.items()
    }
    refused = {
        "decimal": r"\frac{1}{3}",
        "list reversed": "(1,2)",
        "one of a list": "2,2",
        "other sign": r"\frac{0}{2}",
    }
    assert [forms[name](answer) for name, answer in refused.items()] == [None] * 4
    assert EQUAL["list reversed"]("1,234") is None and str(Tally(0, 0)) == "-"


def test_a_run_counts_what_is_read_and_what_agrees(tmp_path: Path):
    rows = [{"answer": r"\frac{1}{4}"}, {"answer": "1,2"}, {"answer": "7"}, {"answer": "((", "error": None}]
    (tmp_path / "toy.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [sys.executable, "-m", "benchmarks.grading", "--data", str(tmp_path), "--out", str(tmp_path / "out.json")]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    (result,) = json.loads((tmp_path / "out.json").read_text())["results"]
    assert (result["answers"], result["read"]) == (4, 3)
    assert result["equal"]["decimal"] == [1, 1] and result["equal"]["itself"] == [4, 4]
    assert result["unequal"] == {"number + 1": [1, 1], "other sign": [1, 1], "one of a list": [1, 1]}
    assert "| toy | 3/4 | 4/4 |" in ran.stdout
    (tmp_path / "toy.jsonl").unlink()
    empty = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert empty.returncode == 1 and "there are no .jsonl files here" in empty.stderr

"""Results of problems become those of benchmarks, tables and comparisons, with numbers worked by hand."""

from pathlib import Path

import pytest

from lens_megatron.evaluation.journal import EvaluationIdentity, identity_to_json
from lens_megatron.evaluation.protocols import NAMED
from lens_megatron.evaluation.summary import ProblemResult, combine, summarise
from lens_megatron.evaluation.tables import read_problem_results, table, to_json
from lens_megatron.tools.evaluate.main import main

PAPER = NAMED["lens-paper"]


def problem(name: str, correct: int, samples: int, **fields) -> ProblemResult:
    nothing = {"subject": "", "level": "", "truncated": 0, "unparsed": 0, "timed_out": 0, "tokens": 10 * samples}
    return ProblemResult(name, correct=correct, samples=samples, **nothing | {"groups": (), "borda": None} | fields)


def identity(**fields) -> EvaluationIdentity:
    given = dict(protocol="lens-paper", protocol_hash=PAPER.hash, settings=PAPER.canonical(), model="m")
    given |= dict(fingerprint="f", engine="local", dtype="float32", grader="math_verify", seed=0)
    return EvaluationIdentity(**given | dict(digests=(("amc23", "d"), ("math500", "d"))) | fields)


def write(folder: Path, scores: dict[str, list[int]], **fields) -> str:
    """A folder as lens-eval leaves it, with one sample of each problem."""
    folder.mkdir()
    results = [summarise(n, [problem(str(i), c, 1) for i, c in enumerate(own)], 0) for n, own in scores.items()]
    (folder / "evaluation.json").write_text(identity_to_json(identity(**fields)))
    (folder / "results.json").write_text(to_json(combine(results, 0), identity(**fields), {}))
    return str(folder)


def test_a_benchmark_by_hand():
    found = summarise(
        "amc23",
        [
            problem("a", 2, 4, groups=(0, 0, 1, 2), borda=1.0, subject="x", truncated=1, tokens=60),
            problem("b", 0, 4, groups=(1, 1, 1, -1), borda=0.0, subject="y", unparsed=1, timed_out=1, tokens=20),
        ],
        seed=0,
    )
    assert found.accuracy.mean == 0.25 and (found.accuracy.low, found.accuracy.high) == (0.0, 0.5)
    assert found.pass_at == pytest.approx([0.25, 5 / 12, 0.5, 0.5])
    assert found.majority_at == ((4, 0.5),) and found.borda == 0.5
    assert (found.truncated, found.unparsed, found.timed_out, found.mean_tokens) == (1 / 8, 1 / 8, 1 / 8, 10)
    assert [(part.name, part.problems, part.accuracy.mean) for part in found.by_subject] == [("x", 1, 0.5), ("y", 1, 0)]
    assert found.by_level == ()  # the data has one level for all


def test_the_average_is_of_the_papers_benchmarks_alone():
    results = [summarise(n, [problem("a", c, 1)], 0) for n, c in (("math500", 1), ("amc23", 0), ("generated", 0))]
    found = combine(results, 0)
    assert found.average is not None and found.average.mean == 0.5
    lines = table(found, identity(), ["A note."]).splitlines()
    assert "|  | MATH500 | AMC23 | Average | generated |" in lines
    assert "| avg@k | 100.0 | 0.0 | 50.0 | 0.0 |" in lines
    assert "A note." in lines


def test_results_are_read_back(tmp_path: Path):
    folder = write(tmp_path / "a", {"math500": [1, 0]})
    assert read_problem_results(Path(folder)) == {"math500": (problem("0", 1, 1), problem("1", 0, 1))}


def test_a_comparison_by_hand(tmp_path: Path, capsys):
    """Three of four problems differ, all for A: p is 2 of 8 sign flips. The average of +75 % and 0 is +37.5 %."""
    a = write(tmp_path / "a", {"math500": [1, 1, 1, 0], "amc23": [1]})
    b = write(tmp_path / "b", {"math500": [0, 0, 0, 0], "amc23": [1]})
    assert main(["compare", a, b]) == 0
    lines = capsys.readouterr().out.splitlines()
    row = next(line for line in lines if line.startswith("| MATH500"))
    assert row.startswith("| MATH500 | 4 | 75.0 | 0.0 | +75.0 | [+") and row.endswith("| 0.2500 |")
    mean = next(line for line in lines if line.startswith("| Average"))
    assert mean.startswith("| Average | 5 | 87.5 | 50.0 | +37.5 |") and mean.endswith("| 0.2500 |")


def test_comparisons_that_mean_nothing_are_refused(tmp_path: Path, capsys):
    a, b = write(tmp_path / "a", {"math500": [1]}), write(tmp_path / "b", {"amc23": [1]})
    assert main(["compare", a, b]) == 2
    assert "has math500, " in capsys.readouterr().err
    c = write(tmp_path / "c", {"math500": [1]}, digests=(("math500", "other"),))
    assert main(["compare", a, c]) == 2
    assert "has data d, " in capsys.readouterr().err
    d = write(tmp_path / "d", {"math500": [1]}, protocol_hash="0" * 16)
    assert main(["compare", a, d]) == 0
    assert "warning: " in (out := capsys.readouterr().out) and f"lens-paper {'0' * 16}" in out

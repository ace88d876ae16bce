"""Overlap by hand: shingles of 13 words, shares, and the warning before training."""

import json
from pathlib import Path

from lens_megatron.evaluation.benchmarks import EvalProblem
from lens_megatron.evaluation.overlap import Overlap, find_overlaps, shingles, summary_lines
from lens_megatron.tools.evaluate.main import main

WORDS = [f"w{number}" for number in range(15)]


def problem(name: str, text: str) -> EvalProblem:
    return EvalProblem("mine", name, 0, text, "1", "", "", "")


def test_shingles_by_hand():
    assert shingles("$A$, b:  C!", words=2) == {"a b", "b c"}
    assert shingles("a b c", words=13) == {"a b c"} and shingles(" .,") == set()
    assert len(shingles(" ".join(WORDS))) == 3


def test_shares_by_hand():
    """15 words make 3 shingles. The first 14 words hold 2 of them; 13 hold 1, which is below one half."""
    whole = problem("a", " ".join(WORDS))
    training = ["unrelated", " ".join(WORDS[:13]), "Before: " + " ".join(WORDS[:14]) + " after."]
    assert find_overlaps(training, [whole]) == (Overlap("mine", "a", 2, 2 / 3),)
    assert find_overlaps(training[:2], [whole]) == ()
    assert find_overlaps(training[:2], [whole], threshold=0.3) == (Overlap("mine", "a", 1, 1 / 3),)


def test_a_short_problem_overlaps_as_a_whole_text_only():
    assert find_overlaps(["What is 1 + 1?"], [problem("a", "what is $1 + 1$")]) == (Overlap("mine", "a", 0, 1.0),)
    assert find_overlaps(["So what is 1 + 1?"], [problem("a", "What is 1 + 1?")]) == ()


def test_the_summary_names_rows():
    problems = [problem("a", "x"), problem("b", "y")]
    (line,) = summary_lines([Overlap("mine", "a", 7, 0.75)], problems, "train.jsonl")
    assert line == (
        "mine: 1 of 2 problems share at least 50% of their 13-word shingles with a text of train.jsonl: a (row 7, 75%)"
    )
    assert summary_lines([], problems, "train.jsonl") == []


def test_the_command(tmp_path: Path, capsys):
    rows = [{"problem": " ".join(WORDS), "answer": "1"}, {"problem": "other", "answer": "2"}]
    for name in ("train", "mine"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        rows.reverse()
    words = ["overlap", "--train", str(tmp_path / "train.jsonl"), "--benchmarks", "mine", "--data", str(tmp_path)]
    assert main([*words, "--out", str(tmp_path / "out.jsonl")]) == 0
    assert "mine: 2 of 2 problems share" in capsys.readouterr().out
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [(each["problem"], each["row"]) for each in found] == [("0", 1), ("1", 0)]

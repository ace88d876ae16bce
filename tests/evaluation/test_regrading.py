"""Logs of other harnesses are read, graded again, and compared with what the harness said."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from lens_megatron.data.datasets import DataError
from lens_megatron.evaluation.regrading import LoggedSample, read_log
from lens_megatron.tools.evaluate.main import main


def lm_eval(path: Path) -> Path:
    """Two filters for each document, as gsm8k has; the second document was graded wrongly, the third too kindly."""
    rows = []
    for doc, target, text, score in (
        (0, "so\n#### 18", "\\boxed{18}", 1.0),
        (1, "1/2", "\\boxed{0.5}", 0.0),
        (2, "7", "\\boxed{8}", 1.0),
    ):
        row = {"doc_id": doc, "doc": {}, "target": target, "arguments": {}, "resps": [[text]]}
        rows += [row | {"filter": name, "exact_match": score} for name in ("strict-match", "flexible-extract")]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_lm_evaluation_harness(tmp_path: Path):
    assert read_log(lm_eval(tmp_path / "samples_x.jsonl")) == [
        LoggedSample("0", 0, "\\boxed{18}", "18", 1.0),
        LoggedSample("1", 0, "\\boxed{0.5}", "1/2", 0.0),
        LoggedSample("2", 0, "\\boxed{8}", "7", 1.0),
    ]


def test_lighteval_in_both_forms(tmp_path: Path):
    new = {
        "doc": [{"choices": ["18"], "gold_index": [0]}],
        "model_response": [{"text": ["\\boxed{18}", "\\boxed{3}"]}],
        "metric": [{"pass@1": 0.5}],
    }
    old = {"gold": ["['18']"], "predictions": ["['\\\\boxed{18}']"], "metrics": [{"extractive_match": 1.0}]}
    for name, columns in (("new", new), ("old", old)):
        pa.parquet.write_table(pa.table(columns), tmp_path / f"{name}.parquet")
    first, second = read_log(tmp_path / "new.parquet")
    assert first == LoggedSample("0", 0, "\\boxed{18}", "18", None)  # one number for two completions is nobody's grade
    assert (second.sample, second.text) == (1, "\\boxed{3}")
    assert read_log(tmp_path / "old.parquet") == [LoggedSample("0", 0, "\\boxed{18}", "18", 1.0)]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("x.jsonl", '{"doc_id": 1}\n', "x.jsonl:1: no doc_id, target and resps, but doc_id"),
        ("x.jsonl", "{\n", "x.jsonl:1: malformed JSON"),
        ("x.jsonl", "", "holds no samples"),
        ("x.txt", "", "expected samples_"),
        ("x.parquet", "no", "cannot be read as parquet"),
    ],
)
def test_files_that_are_no_logs_are_refused(tmp_path: Path, name: str, content: str, message: str):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        read_log(tmp_path / name)


def test_grading_is_told_from_sampling(tmp_path: Path, capsys):
    log, out = lm_eval(tmp_path / "samples_x.jsonl"), tmp_path / "out.jsonl"
    assert main(["regrade", str(log), "--workers", "1", "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "3 completions of 3 problems; graded here 66.7 %" in shown
    assert "the harness says 66.7 %; grading differs on 2 of 3: 1 correct only here, 1 correct only there" in shown
    assert "correct only here : problem 1, expected '1/2', read '0.5'" in shown
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["status"] for row in rows] == ["correct", "correct", "wrong"]
    assert main(["regrade", str(tmp_path / "none.jsonl")]) == 2
    assert "none.jsonl: cannot be read" in capsys.readouterr().err

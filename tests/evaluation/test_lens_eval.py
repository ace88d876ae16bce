"""lens-eval on a tiny model: the real engine, graders and files."""

import fcntl
import json
import re
import shutil
from collections import Counter
from pathlib import Path

import pytest
from toy_runs import Toy, launch

from lens_megatron.tools.evaluate.main import main

PROTOCOL = r"""
template: '{problem} So \boxed{'
max_tokens: 6
samples: 4
top_p: 0.9
extractor: boxed_or_last_number
"""


@pytest.fixture(scope="module")
def protocol(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("protocol") / "tiny.yaml"
    path.write_text(PROTOCOL)
    return path


def run(toy: Toy, protocol: Path, out: Path, *words: str) -> int:
    words = ("--data", f"mine={toy.eval}", "--protocol", str(protocol), "--out", str(out), "--workers", "1", *words)
    return main(["--model", str(toy.model), "--benchmarks", "mine", "--generated", "3", "--limit", "5", *words])


@pytest.fixture(scope="module")
def evaluated(toy: Toy, protocol: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("evaluated") / "out"
    assert run(toy, protocol, out) == 0
    return out


@pytest.fixture
def folder(evaluated: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return shutil.copytree(evaluated, tmp_path / "copy")


def samples_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def test_results_are_those_of_the_samples(evaluated: Path):
    samples, results = samples_of(evaluated), json.loads((evaluated / "results.json").read_text())
    assert Counter(sample["benchmark"] for sample in samples) == {"mine": 5 * 4, "generated": 3 * 4}
    mine, generated = results["benchmarks"]
    assert (mine["name"], generated["name"], results["average"]) == ("mine", "generated", None)
    own = [sample for sample in samples if sample["benchmark"] == "mine"]
    shares = {status: sum(s["status"] == status for s in own) / 20 for status in ("correct", "unparsed")}
    assert mine["accuracy"]["mean"] == pytest.approx(shares["correct"])
    assert mine["unparsed"] == pytest.approx(shares["unparsed"])
    assert mine["truncated"] == pytest.approx(sum(not sample["finished"] for sample in own) / 20)
    assert len(mine["pass_at"]) == 4 and mine["pass_at"][0] == pytest.approx(shares["correct"])
    assert all(len(problem["groups"]) == 4 for problem in mine["problems"])
    assert all(sample["certainty"] > 0 for sample in samples)  # the local engine reports it
    assert results["identity"]["settings"]["top_p"] == 0.9 and "math-verify" in results["versions"]
    table = (evaluated / "table.md").read_text()
    assert "|  | mine | generated |" in table and results["identity"]["protocol_hash"] in table


def test_an_interrupted_evaluation_goes_on_to_the_same_samples(toy: Toy, protocol: Path, folder: Path):
    results = (folder / "results.json").read_bytes()
    before = sorted(samples_of(folder), key=str)
    lines = (folder / "samples.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "samples.jsonl").write_bytes(b"".join(lines[:20]) + lines[20][:30])  # a kill in the middle of a line
    (folder / "results.json").unlink()
    assert run(toy, protocol, folder) == 0
    after = samples_of(folder)
    assert after[:20] == [json.loads(line) for line in lines[:20]]
    exact = ("benchmark", "problem", "sample", "status", "extracted", "tokens", "finished", "text")
    assert [[s[name] for name in exact] for s in sorted(after, key=str)] == [[s[n] for n in exact] for s in before]
    found, expected = json.loads((folder / "results.json").read_text()), json.loads(results)
    assert found["benchmarks"] == expected["benchmarks"]


def test_a_finished_evaluation_samples_nothing(toy: Toy, protocol: Path, folder: Path, capsys):
    before = (folder / "samples.jsonl").read_bytes()
    assert run(toy, protocol, folder) == 0
    assert (folder / "samples.jsonl").read_bytes() == before
    assert "samples to draw" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, message",
    [
        (["--samples", "2"], r"protocol tiny \w{16}, and not tiny \w{16}; choose another folder"),
        (["--seed", "1"], "seed 0, and not 1"),
        (["--dtype", "bfloat16"], "dtype float32, and not bfloat16"),
    ],
)
def test_samples_of_another_evaluation_are_refused(toy: Toy, protocol: Path, folder: Path, capsys, words, message):
    before = (folder / "samples.jsonl").read_bytes()
    assert run(toy, protocol, folder, *words) == 2
    errors = capsys.readouterr().err
    assert "holds samples of another evaluation" in errors and re.search(message, errors)
    assert (folder / "samples.jsonl").read_bytes() == before


def test_another_model_and_other_data_are_refused(toy: Toy, protocol: Path, folder: Path, capsys):
    content = json.loads((folder / "evaluation.json").read_text())
    for change, message in (
        ({"fingerprint": "0" * 16}, f"model {toy.model} ({'0' * 16}), and not {toy.model}"),
        ({"digests": {"mine": "1" * 16}}, f"other problems or answers of mine (digest {'1' * 16}, and not"),
    ):
        (folder / "evaluation.json").write_text(json.dumps(content | change))
        assert run(toy, protocol, folder) == 2
        assert message in capsys.readouterr().err


def test_a_folder_in_use_and_broken_files_are_refused(toy: Toy, protocol: Path, folder: Path, capsys):
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert run(toy, protocol, folder) == 2
    assert "another evaluation writes there" in capsys.readouterr().err
    lines = (folder / "samples.jsonl").read_text().splitlines(keepends=True)
    (folder / "samples.jsonl").write_text("".join([lines[0], "{}\n", *lines[1:]]))
    assert run(toy, protocol, folder) == 2
    assert "samples.jsonl:2: no sample of an evaluation" in capsys.readouterr().err
    (folder / "evaluation.json").write_text("{")
    assert run(toy, protocol, folder) == 2
    assert "evaluation.json: cannot be read" in capsys.readouterr().err


def test_mistakes_are_messages(toy: Toy, tmp_path: Path, capsys):
    model = ["--model", str(toy.model), "--out", str(tmp_path / "out")]
    for words, message in (
        ([*model, "--benchmarks", "olympiadbench"], "benchmark olympiadbench: no data"),
        ([*model, "--benchmarks", "mine", "--protocol", "none"], "no protocol is called 'none'"),
        ([*model, "--benchmarks", "mine", "--model", str(tmp_path)], "no config.json there"),
    ):
        assert main(words) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_evaluation_compared_with_itself(evaluated: Path, capsys):
    assert main(["compare", str(evaluated), str(evaluated)]) == 0
    shown = capsys.readouterr().out
    assert "| +0.0 | [+0.0, +0.0] | 1.0000 |" in shown and "| mine | 5 |" in shown
    assert main(["compare", str(evaluated), str(evaluated.parent)]) == 2
    assert "no evaluation there" in capsys.readouterr().err


def test_the_named_protocols_are_listed(capsys):
    assert main(["protocols"]) == 0
    assert "protocol lens-paper 4ac0b9ef056e09d6: temperature 1, 4096 tokens" in capsys.readouterr().out


def test_training_evaluates_by_a_protocol(toy: Toy, protocol: Path, tmp_path: Path):
    """On two ranks; a prompt of the evaluation is the protocol's, and the statistics are those of lens-eval."""
    tree = toy.tree(
        tmp_path / "run",
        data={"eval": [str(toy.eval)]},
        train={"steps": 1, "eval_protocol": str(protocol)},
        reward={"grader": "math_verify"},
    )
    rows = launch(tree, tmp_path, 2)
    last = rows[-1]
    assert 0 <= last["val-core/eval/acc/mean@4"] <= last["val-aux/eval/acc/pass@4"] <= 1
    assert last["val-aux/eval/acc/standard_error"] > 0  # also where no sample is correct
    assert {"truncated", "unparsed", "grading_failed", "acc/maj@4"} <= {
        name.removeprefix("val-aux/eval/") for name in last
    }

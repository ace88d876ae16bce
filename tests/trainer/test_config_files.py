"""Several files and their base files are one configuration."""

from pathlib import Path

import pytest

from lens_megatron.config import ConfigError, load

BASE = "run: {directory: runs/a}\nmodel: {path: m}\ndata: {train: t.jsonl}\n"


def error(call, *arguments) -> str:
    with pytest.raises(ConfigError) as caught:
        call(*arguments)
    return str(caught.value)


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_a_file_stands_over_its_bases_and_a_later_base_over_an_earlier(tmp_path):
    write(tmp_path / "base" / "a.yaml", BASE + "train: {steps: 1, save_interval: 2}\nlens: {tau: 0.1}\n")
    write(tmp_path / "base" / "b.yaml", "base: a.yaml\ntrain: {steps: 3}\ndata: {eval: [x, y]}\n")
    config = load(
        write(tmp_path / "c.yaml", "base: [base/a.yaml, base/b.yaml]\nlens:\ndata: {eval: [z]}\n"),
        ["train.eval_interval=9"],
    )
    train = config.train
    assert (train.steps, train.save_interval, train.eval_interval) == (3, 2, 9)
    assert config.lens.tau == 0.1  # an empty section takes nothing away
    assert config.data.eval == ("z",) and config.data.train == "t.jsonl"


def test_of_several_files_a_later_one_wins_and_overrides_win_over_all(tmp_path):
    first = write(tmp_path / "first.yaml", BASE + "train: {steps: 1, save_interval: 2}\n")
    second = write(tmp_path / "second.yaml", "base: third.yaml\ntrain: {steps: 3}\n")
    write(tmp_path / "third.yaml", "train: {steps: 4, eval_interval: 5}\n")
    train = load([first, str(second)], ["train.eval_interval=6"]).train
    assert (train.steps, train.save_interval, train.eval_interval) == (3, 2, 6)
    assert load([second, first]).train.steps == 1
    assert error(load, [first, tmp_path / "none.yaml"]) == f"no configuration file at {tmp_path}/none.yaml"


def test_an_empty_mapping_empties_what_stands_below_it_wherever_its_file_is_named(tmp_path):
    flips = write(tmp_path / "flips.yaml", BASE + "reward: {rules: {flips: {rate: 0.3}}}\n")
    clean = write(tmp_path / "clean.yaml", "reward: {rules: {}}\n")
    overlong = write(tmp_path / "overlong.yaml", "base: clean.yaml\nreward: {rules: {overlong: {}}}\n")
    assert load([flips, clean]).reward.rules == {}
    assert load([flips, overlong]).reward.rules == {"overlong": {}}
    assert load([flips, overlong, flips]).reward.rules == {"overlong": {}, "flips": {"rate": 0.3}}
    both = write(tmp_path / "both.yaml", "base: [overlong.yaml, flips.yaml, clean.yaml]\n")
    assert load(both).reward.rules == {}, "the file that is named twice stands at its last place"


def test_mistakes_in_base_files_are_named(tmp_path):
    a = write(tmp_path / "a.yaml", "base: b.yaml\n" + BASE)
    b = write(tmp_path / "b.yaml", "base: a.yaml\n")
    assert error(load, a) == (
        f"{a}: base: the files name each other in a circle: {a} -> {b} -> {a}; remove one of them"
    )
    write(b, "lens: {tua: 0.1}\n")
    assert error(load, a) == "unknown option lens.tua; did you mean lens.tau?"
    b.unlink()
    assert error(load, a) == f"{a}: base: no configuration file at {b}"
    write(a, "base: {x: 1}\n" + BASE)
    assert error(load, a) == f"{a}: base: expected a file name or a list of file names relative to this file"

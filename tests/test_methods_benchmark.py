"""The table of methods: what it counts, with numbers worked out by hand, and which runs it makes."""

from pathlib import Path

import pytest

from benchmarks import methods
from benchmarks.methods import ACCURACY, RunSummary
from lens_megatron import command_line
from lens_megatron import config as configuration

STEP = {
    "timing_s/step": 2.0, "perf/generated_tokens": 100.0, "lens/prompts": 4.0, "lens/purified_prompts": 3.0,
    "lens/rescued_prompts": 1.0, "lens/destroyed_groups": 1.0, "lens/zero_variance_before": 0.5,
    "lens/zero_variance_after": 0.25, "lens/extra_rollouts": 24.0, "lens/extra_tokens": 40.0, "lens/extra_seconds": 0.5,
}  # fmt: skip
ROWS = [
    {"step": 0, ACCURACY: 0.4},
    {"step": 1, **STEP},
    {
        "step": 2,
        **STEP,
        ACCURACY: 0.6,
        "lens/purified_prompts": 1.0,
        "lens/prompts": 12.0,
        "lens/zero_variance_after": 0,
    },
]


def test_the_numbers_of_a_run():
    assert methods.summarise(ROWS) == RunSummary(
        accuracy=[0.4, 0.6],
        steps=2,
        sampled_tokens=200.0,
        seconds=4.0,
        gate_open_rate=0.5,  # 2 of 4
        destroyed_groups=2.0,
        zero_variance_before=0.5,
        zero_variance_after=0.0625,  # 1 of 16
        extra_rollouts=48.0,
        extra_tokens=80.0,
        extra_seconds=1.0,
    )


def test_the_mean_and_its_standard_error_over_seeds():
    run = methods.summarise(ROWS)
    runs = [RunSummary(**{**_fields(run), "accuracy": [0.4, final]}) for final in (0.5, 0.6, 0.7)]
    found = methods.over_seeds(runs)
    assert found.final_accuracy == pytest.approx(0.6) and found.standard_error == pytest.approx(0.1 / 3**0.5)
    assert methods.over_seeds([run]).standard_error == 0
    rows = methods.table({"worse": methods.over_seeds([run]), "better": methods.over_seeds([runs[2]])}).splitlines()
    assert rows[2].startswith("| better | 1 | 70.0 ± 0.0 % | 2 | 200 | 4 | 50 % | 2.0 | 50 % | 6 % | 48 | 80 | 1 |")
    assert rows[3].startswith("| worse |") and len({row.count("|") for row in rows}) == 1


def _fields(run: RunSummary) -> dict:
    return {name: getattr(run, name) for name in RunSummary.__dataclass_fields__}


def test_an_extended_method_takes_twice_the_steps():
    assert methods.steps_of("dapo", 60) == methods.steps_of("grpo", 60) == 60
    assert methods.steps_of("dapo_extended", 60) == methods.steps_of("greso_extended", 60) == 120


@pytest.mark.parametrize("method", [*methods.PAPER.split(","), "grpo+reward_flips+rpr_wrong"])
def test_its_command_is_one_that_training_takes(method: str):
    words = methods.command(Path("/demo"), Path("/runs/a"), method, seed=1, steps=7)
    parsed = command_line.parse(words[words.index("pretrain_lens.py") + 1 :])
    files = [methods.ROOT / name for name in parsed.files]
    config = configuration.load(files, parsed.overrides)
    assert (config.run.seed, config.train.steps, config.train.epochs) == (1, 7, None)


def test_a_method_without_a_file_is_refused():
    with pytest.raises(SystemExit, match="no method 'grop': there is no configs/methods/grop.yaml"):
        methods.files("grop")


def test_a_run_is_finished_when_its_last_step_was_evaluated(tmp_path: Path):
    assert not methods.is_finished(tmp_path, 2)
    lines = ['{"step": 1, "a": 1}', f'{{"step": 2, "{ACCURACY}": 0.5}}']
    (tmp_path / "metrics.jsonl").write_text(lines[0] + "\n")
    assert not methods.is_finished(tmp_path, 2)
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert methods.is_finished(tmp_path, 2) and not methods.is_finished(tmp_path, 4)


def test_what_was_measured_in_an_earlier_sitting_is_read_again(tmp_path: Path):
    out = tmp_path / "results.json"
    assert methods.read_runs(out, {"lens": 2}) == {}
    run = methods.MeasuredRun(methods.summarise(ROWS), {"git_commit": "abc"})
    methods.write_runs(out, {"lens": {0: run, 2: run}}, "command", {"parameters": 7})
    assert methods.read_runs(out, {"lens": 2}) == {"lens": {0: run, 2: run}}
    assert methods.read_runs(out, {"lens": 60}) == {"lens": {}}  # its runs are shorter than what is asked for

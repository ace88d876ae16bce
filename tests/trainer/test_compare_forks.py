"""Forks of a real run: they go on exactly, with another method's options, and mistakes are told first."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from toy_runs import ROOT, Toy, checkpoint_tensors, environment, launch, run_program, run_ranks

from lens_megatron.algorithms.selection.greso import Greso, GresoOptions
from lens_megatron.output import run_folder
from lens_megatron.output.metrics import read_metrics
from lens_megatron.policy import checkpoint_files
from lens_megatron.policy.checkpoint_files import folder_name
from lens_megatron.tools.compare import command, forks, gradient_run, methods, processes, training
from lens_megatron.tools.compare.arms import Arm, make_arm, progress
from lens_megatron.tools.compare.forks import ForkPoint, find_fork
from lens_megatron.tools.compare.request import Budget, BudgetUnit, CompareError

ONE_STEP = Budget(BudgetUnit.STEPS, 1)
TOY = ("lens.tau=1.0", "lens.min_score=0.0")
"""With the options that files of methods set the toy model would rescue nothing."""


@pytest.fixture(scope="module")
def run(toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three steps of LENS, with the checkpoints of steps 2 and 3."""
    folder = tmp_path_factory.mktemp("compare")
    tree = toy.tree(
        folder / "run",
        data={"eval": [str(toy.eval)]},
        train={"steps": 3, "save_interval": 1, "save_total_limit": 2, "async_save": False},
        debug={"save_rollouts": str(folder / "saved")},
    )
    launch(tree, folder, 1)
    return folder / "run"


def arm_of(run: Path, name: str, out: Path, *overrides: str, seed: int = 0, budget: Budget = ONE_STEP) -> Arm:
    (method,) = methods.find_methods(name)
    return make_arm(find_fork(f"{run}@2"), method, seed, budget, out, overrides, 1)


def trained(arm: Arm, fork: ForkPoint, *overrides: str) -> list[dict]:
    """Begins the arm and trains it to its end as lens-compare does, but without torchrun."""
    forks.begin(fork, arm.config)
    run_program(arm.config.model_dump(mode="json"), arm.folder.with_name("settings"), 1, *overrides)
    return read_metrics(arm.folder)


def test_a_fork_with_the_runs_own_options_and_seed_is_the_run(run: Path, tmp_path: Path):
    fork = find_fork(f"{run}@2")
    arm = arm_of(run, "own", tmp_path)
    rows = trained(arm, fork)
    expected, found = checkpoint_tensors(run, 3, 1), checkpoint_tensors(arm.folder, 3, 1)
    assert expected.keys() == found.keys() and all(torch.equal(expected[name], found[name]) for name in expected)
    assert progress(arm, fork, ONE_STEP).is_done
    of_run = {row["step"]: row for row in read_metrics(run)}
    assert [row["step"] for row in rows] == [0, 1, 2, 3] and rows[:3] == [of_run[step] for step in range(3)]
    assert rows[3]["actor/grad_norm"] == of_run[3]["actor/grad_norm"]
    assert json.loads((arm.folder / run_folder.MARKER).read_text())["fork"] == f"{run}@2"
    assert checkpoint_files.whole(run / "checkpoints")[0].state.step == 2  # the run has lost nothing


def test_a_fork_with_another_method_has_its_options_and_links_to_the_tensors(run: Path, tmp_path: Path):
    fork, arm = find_fork(f"{run}@2"), arm_of(run, "dapo", tmp_path, *TOY, seed=1)
    forks.begin(fork, arm.config)
    recorded = run_folder.read_options(arm.folder)
    assert recorded["algorithm"]["clip_high"] == 0.28 and recorded["lens"]["enabled"] is False
    assert (recorded["run"]["seed"], recorded["train"]["steps"], recorded["train"]["epochs"]) == (5, 3, None)
    assert recorded["debug"] == {"save_rollouts": None, "load_rollouts": None, "rollout_only": False}
    copy = checkpoint_files.inspect(arm.folder / "checkpoints" / folder_name(2))
    checkpoint_files.verify(copy)
    assert (copy.path / "rank_00000.safetensors").samefile(fork.checkpoint.path / "rank_00000.safetensors")
    assert copy.state.selection == fork.checkpoint.state.selection == {"position": 8}
    assert run_folder.check(arm.config)  # it is a run to go on with
    with pytest.raises(CompareError, match="was begun otherwise.*optimizer.lr"):
        training.check_arm(arm_of(run, "dapo", tmp_path, *TOY, "optimizer.lr=0.5", seed=1), fork, ONE_STEP)


def test_another_selection_begins_at_the_same_place(run: Path, tmp_path: Path):
    fork, arm = find_fork(f"{run}@2"), arm_of(run, "greso", tmp_path)
    state = forks.state_for(fork, arm.config)
    assert state.selection == {"position": 8, "p_easy": 0.5, "p_hard": 0.5, "prompts": [], "streaks": []}
    selection = Greso(forks._NoPrompts(), 0, GresoOptions())
    selection.restore(state.selection or {})
    assert selection.position == 8
    forks.begin(fork, arm.config)
    # A fork of the fork with the same selection keeps what it remembers.
    again = ForkPoint(arm.folder, checkpoint_files.inspect(arm.folder / "checkpoints" / folder_name(2)),
                      run_folder.read_options(arm.folder))  # fmt: skip
    assert forks.state_for(again, arm.config) == again.checkpoint.state


def test_an_arm_goes_back_to_the_step_that_reached_the_budget(run: Path, tmp_path: Path):
    """Two steps ended before the arm was stopped: its checkpoints are later than the budget, so the fork's is put."""
    budget = Budget(BudgetUnit.TOKENS, 5)
    fork, arm = find_fork(f"{run}@2"), arm_of(run, "own", tmp_path, budget=budget)
    forks.begin(fork, arm.config)
    folder = arm.folder / "checkpoints"
    shutil.copytree(run / "checkpoints" / folder_name(3), folder / folder_name(3))
    (folder / folder_name(3)).rename(folder / folder_name(4))
    shutil.rmtree(folder / folder_name(2))
    training._go_back(arm, fork, 3)
    (only,) = checkpoint_files.published(folder)
    assert checkpoint_files.inspect(only).state == fork.checkpoint.state


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("{run}", "expected RUN@STEP"),
        ("{run}@x", "expected RUN@STEP"),
        ("{run}/nowhere@2", "there is no such folder"),
        ("{run}/checkpoints@2", "no lens_run.json of its own"),
        ("{run}@1", "has no checkpoint of step 1; it has those of step 2, 3"),
    ],
)
def test_forks_that_are_none(name: str, message: str, run: Path):
    with pytest.raises(CompareError, match=message):
        find_fork(name.format(run=run))


def test_a_checkpoint_of_another_format_is_refused(run: Path, tmp_path: Path):
    shutil.copytree(run, tmp_path / "run")
    path = tmp_path / "run" / "checkpoints" / folder_name(2) / checkpoint_files.INDEX
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 3}))
    with pytest.raises(CompareError, match="is of format 3; this version reads 1 and 2; take another step"):
        find_fork(f"{tmp_path}/run@2")


def refused(capsys: pytest.CaptureFixture, *words: str | Path) -> str:
    assert command.main([str(word) for word in words]) == 2
    return capsys.readouterr().out


def test_mistakes_are_told_before_anything_is_written(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    fork, out = f"--fork={run}@2", f"--out={tmp_path / 'out'}"
    ask = (fork, out, "--methods=lens,grpo", "--budget=steps=2")
    assert "lens-compare sets itself: run.directory, run.seed" in refused(capsys, *ask, "run.seed=3")
    assert "lens: unknown option lens.tua; did you mean lens.tau?" in refused(capsys, *ask, "lens.tua=0.3")
    assert "--baseline dapo is not among" in refused(capsys, *ask, "--baseline=dapo")
    assert "lies in the run" in refused(capsys, *ask, f"--out={run}/arms")
    assert "data.eval is empty" in refused(capsys, *ask, "data.eval=[]")
    assert "divisible by data-parallel size" in refused(capsys, *ask, "--nproc-per-node=3")
    assert "give --budget steps=K" in refused(
        capsys, fork, out, "--methods=lens", "--budget=tokens=9", "optimizer.lr_decay_style=linear"
    )
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000))
    size = find_fork(f"{run}@2").bytes
    assert f"of 2 arms take about {3 * size * 1.05 / 1e9:.1f} GB, 0.0 GB are free" in refused(capsys, *ask)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("x")
    assert "holds files that are no comparison" in refused(capsys, *ask, f"--out={tmp_path}/other")
    assert "holds arms that began from" in refused(capsys, *ask, f"--fork={run}@3")


def test_gradients_are_those_of_the_trainers_step(run: Path, tmp_path: Path):
    """The norm of LENS on the batch is what the trainer reports for its step on the same rollouts, and more."""
    fork, names = find_fork(f"{run}@2"), methods.find_methods("lens,grpo,random_pruning,dapo")
    plan = gradient_run.plan_gradients(fork, names, tmp_path, TOY)
    folder = tmp_path / gradient_run.FOLDER
    folder.mkdir()
    settings = gradient_run.write_settings(fork, plan, folder)
    forks.begin(fork, plan.sampling)
    run_ranks(1, ROOT / "tests" / "trainer" / "compare_gradients.py", settings)
    report = gradient_run.read_report(folder)
    lens, grpo, random, dapo = report.methods
    assert report.second_waves > 0 and report.prompts == 4
    of_lens = {numbers.name: numbers for numbers in lens.classes}
    assert "rescued" in of_lens and "rescued" not in {numbers.name for numbers in grpo.classes}
    assert sum(numbers.share for numbers in lens.classes) == pytest.approx(1)
    assert all(numbers.weight == 1 for numbers in grpo.classes) and dapo.groups <= grpo.groups == 4
    assert lens.norm == pytest.approx(sum(norm**2 for norm in lens.norms) ** 0.5)
    cosines = report.whole.cosines
    assert cosines[0][0] == pytest.approx(1) and cosines[0][1] == cosines[1][0] and abs(cosines[0][1] or 0) < 1
    assert cosines[0][2] == pytest.approx(1)  # only the second waves of the two would differ
    for method, gradient in zip(("lens", "grpo"), (lens, grpo), strict=True):
        expected = norm_of_the_trainer(run, tmp_path, method, folder / "batch")
        assert gradient.norm == pytest.approx(expected, rel=1e-5)  # the trainer's is a sum in float32


def norm_of_the_trainer(run: Path, out: Path, name: str, batch: Path) -> float:
    """Trains one step on the saved batch, which stands for those of the steps before the fork too."""
    replayed = out / f"replay_{name}"
    replayed.mkdir()
    lines = (batch / "step_000003.jsonl").read_text().splitlines()
    if name == "grpo":  # it would have sampled no second wave
        lines = [json.dumps(json.loads(line) | {"rescue": [], "purified": None}) for line in lines]
    for step in (1, 2, 3):
        (replayed / f"step_{step:06d}.jsonl").write_text("\n".join(lines) + "\n")
    rows = trained(arm_of(run, name, out, *TOY, "data.eval=[]"), find_fork(f"{run}@2"),
                   f"debug.load_rollouts={replayed}")  # fmt: skip
    return rows[-1]["actor/grad_norm"]


@pytest.mark.slow
def test_two_methods_under_torchrun_whatever_happens(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    words = [f"--fork={run}@2", f"--out={tmp_path}", "--methods=lens,grpo", "--budget=tokens=60", *TOY]
    assert command.main(words) == 0
    text = capsys.readouterr().out
    assert "| grpo | 1 |" in text and "which says nothing about another seed" in text
    content = json.loads((tmp_path / "comparison.json").read_text())
    curves = {m["method"]: m["curves"][0] for m in content["methods"]}
    assert all(curve["tokens"] >= 60 and curve["points"] for curve in curves.values())
    started: list[object] = []
    monkeypatch.setattr(processes, "run", lambda *arguments: started.append(arguments))
    assert command.main(words) == 0 and not started  # nothing is trained twice
    again = json.loads((tmp_path / "comparison.json").read_text())
    assert again == content

"""Runs that are told to stop: within seconds whatever they are doing, with the last finished step saved.

What is not covered: a GPU, engines other than the local one, several machines.
"""

import os
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch
from test_time import wait_until
from toy_runs import ROOT, Toy, checkpoint_tensors, command, environment, launch, start_ranks, write_config

from lens_megatron.output.metrics import read_metrics

FAULTS = Path(__file__).parent
STEPS = 3
SECONDS = 25
"""The longest time from the signal to the end of the last process."""


def tree_of(toy: Toy, folder: Path, **sections: dict) -> dict:
    train = {"steps": STEPS, "save_interval": 100, "eval_interval": 2} | sections.pop("train", {})
    return toy.tree(folder / "run", data={"eval": [str(toy.eval)]}, train=train, **sections)


def surroundings(folder: Path, phase: str = "", step: int = 0) -> dict[str, str]:
    kept = environment()
    kept["PYTHONPATH"] = os.pathsep.join([str(FAULTS), kept["PYTHONPATH"]])
    given = {"SLOW_PHASE": phase, "SLOW_STEP": str(step), "SLOW_REACHED": str(folder / "reached")}
    return kept | given | {"STUCK_FOLDER": str(folder)}


def slowly(arguments: list[str]) -> list[str]:
    return [str(FAULTS / "slow_run.py") if a == str(ROOT / "pretrain_lens.py") else a for a in arguments]


def await_file(path: Path, process: subprocess.Popen, seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline, f"{path.name} did not come"
        time.sleep(0.05)


def family(process: subprocess.Popen) -> list[psutil.Process]:
    return [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]


def ranks_of(process: subprocess.Popen) -> list[psutil.Process]:
    found = []
    for child in psutil.Process(process.pid).children():
        with suppress(psutil.NoSuchProcess):
            if any("slow_run.py" in argument for argument in child.cmdline()):
                found.append(child)
    return sorted(found, key=lambda child: child.environ()["RANK"])


DIFFERENT = ("timing_s/", "perf/weight_sync_", "training/sync_log_prob_diff")
"""Metrics that a resumed run may have in other rows: it must give its engine the weights once more."""


def await_end(process: subprocess.Popen, processes: list[psutil.Process], seconds: float) -> str:
    started = time.monotonic()
    output, _ = process.communicate(timeout=240)
    _, alive = psutil.wait_procs(processes, timeout=30)
    assert not alive, f"left behind: {alive}"
    assert time.monotonic() - started < seconds, output
    assert "forcefully" not in output, output
    return output


def rows_of(folder: Path) -> list[dict]:
    return read_metrics(folder / "run")


def assert_equal_runs(found: Path, expected: Path, ranks: int) -> None:
    """Final weights and optimizer to the bit; every step's row once, with the same numbers."""
    a, b = (checkpoint_tensors(folder / "run", STEPS, ranks) for folder in (found, expected))
    assert a.keys() == b.keys() and [name for name in a if not torch.equal(a[name], b[name])] == []
    assert [row["step"] for row in rows_of(found)] == list(range(STEPS + 1))
    for row, reference in zip(rows_of(found), rows_of(expected), strict=True):
        assert all(name.startswith(DIFFERENT) for name in row.keys() ^ reference.keys())
        for name in ("actor/loss", "critic/rewards/mean", "val-core/eval/acc/mean@1"):
            assert row.get(name) == reference.get(name), (row["step"], name)
    assert (found / "run" / "checkpoints" / f"iter_{STEPS:07d}" / "hf" / "model.safetensors").is_file()


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "run" / "checkpoints").iterdir() if path.is_dir())


@pytest.fixture(scope="module")
def straight(toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Never stopped, on two ranks."""
    folder = tmp_path_factory.mktemp("straight")
    launch(tree_of(toy, folder), folder, 2)
    return folder


# ---- whole runs ---------------------------------------------------------------------------------------------------


def test_a_step_of_an_hour_is_left_within_seconds_and_its_predecessor_saved(toy: Toy, tmp_path: Path):
    """One rank that computes with the reference policy's weights: what is saved are the policy's own."""
    config = write_config(tree_of(toy, tmp_path), tmp_path)
    surroundings_of_ref = surroundings(tmp_path, "ref", 2)
    with start_ranks(1, FAULTS / "slow_run.py", "--config", config, variables=surroundings_of_ref) as process:
        wait_until("the phase", lambda: (tmp_path / "reached").exists() or not process.runs())
        (pid,) = process.pids
        alive = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
        process.send(signal.SIGTERM)
        assert process.wait() == [0], process.stdout() + process.stderr()
        output = process.stdout()
        assert not psutil.wait_procs(alive, timeout=30)[1], "left behind"
    assert "stopped as asked after step 1; the same command goes on from here" in output
    assert checkpoints(tmp_path) == ["iter_0000001"] and [row["step"] for row in rows_of(tmp_path)] == [0, 1]
    launch(tree_of(toy, tmp_path), tmp_path, 1)
    launch(tree_of(toy, tmp_path / "straight"), tmp_path / "straight", 1)
    assert_equal_runs(tmp_path, tmp_path / "straight", 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("phase", "step", "saved"),
    [
        ("start", 0, 0),
        ("testing", 0, 0),
        ("gen", 1, 0),
        ("gen", 2, 1),
        ("old_log_prob", 2, 1),
        ("ref", 2, 1),
        ("update_actor", 2, 1),
        ("testing", 2, 2),
        ("testing", 3, 3),
    ],
)
def test_a_stop_in_any_phase_loses_nothing(toy: Toy, straight: Path, phase: str, step: int, saved: int, tmp_path: Path):
    process = begin(toy, tmp_path, phase, step)
    alive = family(process)
    process.send_signal(signal.SIGTERM)
    output = await_end(process, alive, SECONDS)
    assert "got signal: 15" in output and "stopped as asked" in output, output
    assert phase == "start" or checkpoints(tmp_path) == [f"iter_{saved:07d}"] * bool(saved)
    launch(tree_of(toy, tmp_path), tmp_path, 2)
    assert_equal_runs(tmp_path, straight, 2)


@pytest.mark.slow
@pytest.mark.parametrize("told", [0, 1])
def test_a_signal_to_one_rank_stops_all_with_0(toy: Toy, straight: Path, told: int, tmp_path: Path):
    process = begin(toy, tmp_path, "update_actor", 2)
    alive = family(process)
    ranks_of(process)[told].send_signal(signal.SIGHUP)
    output = await_end(process, alive, SECONDS)
    assert process.returncode == 0 and "stopped as asked after step 1" in output, output
    launch(tree_of(toy, tmp_path), tmp_path, 2)
    assert_equal_runs(tmp_path, straight, 2)


@pytest.mark.slow
def test_ctrl_c_reaches_everybody_and_torchruns_copy_of_it_kills_nobody(toy: Toy, tmp_path: Path):
    process = begin(toy, tmp_path, "gen", 2)
    alive = family(process)
    for member in [process, *ranks_of(process)]:
        member.send_signal(signal.SIGINT)
    output = await_end(process, alive, SECONDS)
    assert "stopped as asked after step 1" in output and checkpoints(tmp_path) == ["iter_0000001"], output


@pytest.mark.slow
def test_a_stuck_grader_does_not_hold_a_stop_up(toy: Toy, straight: Path, tmp_path: Path):
    grading = {"reward": {"grader": "slow_grader:compute_score", "timeout_s": 600.0}}
    (tmp_path / "stuck").touch()
    tree = tree_of(toy, tmp_path, **grading)
    process = subprocess.Popen(
        command(tree, tmp_path, 2),
        env=surroundings(tmp_path),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    await_file(tmp_path / "reached", process)
    alive = family(process)
    process.send_signal(signal.SIGTERM)
    output = await_end(process, alive, SECONDS)
    assert "stopped as asked after step 1" in output and checkpoints(tmp_path) == ["iter_0000001"], output
    (tmp_path / "stuck").unlink()
    result = subprocess.run(command(tree, tmp_path, 2), env=surroundings(tmp_path), capture_output=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert_equal_runs(tmp_path, straight, 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    "sections",
    [
        {"train": {"updates_per_batch": 2}},
        {"megatron": {"use_distributed_optimizer": True}, "model": {"dtype": "bfloat16"}},
        {"megatron": {"tensor_model_parallel_size": 2}},
        {"megatron": {"pipeline_model_parallel_size": 2}},
        {"rollout": {"off_policy_steps": 1}, "algorithm": {"kl_coef": 0.01, "correction": "token_truncate"}},
    ],
    ids=["two updates", "distributed optimizer", "tp2", "pp2", "one step ahead"],
)
def test_what_is_saved_within_an_update_is_what_was_there_before_it(toy: Toy, sections: dict, tmp_path: Path):
    if "model" in sections:
        sections = sections | {"model": sections["model"] | {"path": str(toy.model)}}
    process = begin(toy, tmp_path, "update_actor", 2, **sections)
    alive = family(process)
    process.send_signal(signal.SIGTERM)
    output = await_end(process, alive, SECONDS)
    assert "stopped as asked after step 1" in output, output
    usual = tree_of(toy, tmp_path / "usual", **sections)
    usual["train"] |= {"save_interval": 1, "save_total_limit": 9}
    launch(usual, tmp_path / "usual", 2)
    found, expected = (checkpoint_tensors(folder / "run", 1, 2) for folder in (tmp_path, tmp_path / "usual"))
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


def begin(toy: Toy, folder: Path, phase: str, step: int, **sections: dict) -> subprocess.Popen:
    """A run on two ranks that has reached `phase` of `step`, for an hour."""
    process = subprocess.Popen(
        slowly(command(tree_of(toy, folder, **sections), folder, 2)),
        env=surroundings(folder, phase, step),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    await_file(folder / "reached", process)
    return process

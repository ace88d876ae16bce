"""The folder of a run: what is no run is never touched, a run is moved and never deleted, one process writes to it."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import psutil
import pytest
from toy_runs import ROOT, Toy, command, environment, launch, run_program, start_ranks, torchrun, write_config

from lens_megatron import train
from lens_megatron.config import Config, from_tree
from lens_megatron.errors import ExitCode
from lens_megatron.output import run_folder, run_lease
from lens_megatron.output.run_folder import MARKER, RunFolder, RunFolderError
from lens_megatron.output.run_lease import LEASE, LOCK, FolderInUseError, Owner, RunLease


def made(toy: Toy, folder: Path | str, if_exists: str = "resume", **sections: dict) -> Config:
    return from_tree(toy.tree(folder, **sections, run={"directory": str(folder), "if_exists": if_exists}))


def begun(toy: Toy, folder: Path, **sections: dict) -> None:
    """A run that has written a checkpoint, and ended."""
    run_folder.take(made(toy, folder, **sections), {"world_size": 1}).lease.release()
    (folder / "checkpoints" / "iter_0000002").mkdir(parents=True)
    (folder / "checkpoints" / "iter_0000002" / "state.json").write_text("precious")


def files(folder: Path) -> dict[str, bytes]:
    found = {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
    return {name: content for name, content in found.items() if Path(name).name not in (LOCK, LEASE)}


def refuse(config: Config, message: str) -> None:
    """Neither looking nor taking may go through, or change anything."""
    for act in (run_folder.check, lambda config: run_folder.take(config, {})):
        with pytest.raises((RunFolderError, FolderInUseError), match=message):
            act(config)


HYDRA = {"config.yaml": "defaults: []", ".hydra/config.yaml": "a: 1", "thesis.tex": "precious"}
LOOK_ALIKES = {
    "hydra": HYDRA,
    "parent of runs": {
        "config.yaml": "run: {}",
        "a/lens_run.json": "{}",
        "b/checkpoints/iter_0000001/state.json": "{}",
    },
    "a model": {"config.yaml": "run: {}", "model.safetensors": "weights", "config.json": "{}"},
    "another format": {MARKER: '{"format": "something else"}', "config.yaml": "run: {}"},
    "a damaged marker": {MARKER: "{", "config.yaml": "run: {}"},
    "a marker of nulls": {MARKER: "\0" * 64},
    "nested too deeply": {MARKER: "[" * 100_000},
}


@pytest.mark.parametrize("choice", ["resume", "restart", "fail"])
@pytest.mark.parametrize("kind", LOOK_ALIKES)
def test_a_folder_that_is_no_run_is_left_alone(toy: Toy, tmp_path: Path, kind: str, choice: str):
    folder = tmp_path / "folder"
    for name, content in LOOK_ALIKES[kind].items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    before = files(tmp_path)
    refuse(made(toy, folder, choice), f"holds files that are not a run of lens_megatron \\(no {MARKER} of its own\\)")
    assert files(tmp_path) == before


@pytest.mark.parametrize("name", ["", " ", "x" * 300, "a/" * 3000, "nul\0byte"])
def test_a_name_that_is_no_folder(toy: Toy, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    config = made(toy, tmp_path / "run")
    config = config.model_copy(update={"run": config.run.model_copy(update={"directory": name})})
    refuse(config, "run.directory .*; (give|choose)")
    assert not list(tmp_path.iterdir())


def test_a_circle_of_links(toy: Toy, tmp_path: Path):
    (tmp_path / "run").symlink_to(tmp_path / "other")
    (tmp_path / "other").symlink_to(tmp_path / "run")
    refuse(made(toy, tmp_path / "run"), "cannot be used: .*; choose another folder")


def test_starting_over_moves_the_old_run_aside_and_deletes_nothing(toy: Toy, tmp_path: Path):
    folder = tmp_path / "run"
    begun(toy, folder)
    olds = []
    for number in (1, 2):
        olds.append(files(folder))
        taken = run_folder.take(made(toy, folder, "restart"), {})
        taken.lease.release()
        assert taken.moved == tmp_path / f"run.old-{number}" and not taken.resuming
        assert files(taken.moved) == olds[-1]
        assert not list((folder / "checkpoints").iterdir())
    assert files(tmp_path / "run.old-1") == olds[0] and "precious" in str(olds[0])


def test_a_link_to_a_run_stays_a_link(toy: Toy, tmp_path: Path):
    begun(toy, tmp_path / "disk" / "real")
    (tmp_path / "run").symlink_to(tmp_path / "disk" / "real")
    assert run_folder.check(made(toy, tmp_path / "run"))
    taken = run_folder.take(made(toy, tmp_path / "run", "restart"), {})
    taken.lease.release()
    assert taken.moved == tmp_path / "disk" / "real.old-1" and (tmp_path / "run").is_symlink()
    assert (tmp_path / "run" / MARKER).is_file() and "precious" in str(files(taken.moved))


def inside(toy: Toy, folder: Path, what: str) -> Config:
    """A configuration that wants to start over in `folder`, and needs something that lies in it."""
    path = folder / "mine"
    sections = {
        "model.path": {"model": {"path": str(path)}},
        "model.reference_path": {"model": {"path": str(toy.model), "reference_path": str(path)}},
        "data.train": {"data": {"train": str(path)}},
        "data.eval": {"data": {"train": str(toy.train), "eval": [str(toy.eval), str(path)]}},
        "debug.load_rollouts": {"debug": {"load_rollouts": str(path)}},
        "debug.save_rollouts": {"debug": {"save_rollouts": str(path)}},
    }[what]
    return made(toy, folder, "restart", **sections)


@pytest.mark.parametrize(
    "what",
    ["model.path", "model.reference_path", "data.train", "data.eval", "debug.load_rollouts", "debug.save_rollouts"],
)
def test_starting_over_does_not_take_away_what_the_run_needs(toy: Toy, tmp_path: Path, what: str):
    begun(toy, tmp_path / "run")
    before = files(tmp_path)
    refuse(inside(toy, tmp_path / "run", what), f"restart would move .*, and {what}.* lies in it; move that out")
    assert files(tmp_path) == before


def test_starting_over_does_not_take_away_the_working_folder_or_another_run(toy: Toy, tmp_path: Path, monkeypatch):
    begun(toy, tmp_path / "run")
    begun(toy, tmp_path / "run" / "sweep" / "one")
    refuse(made(toy, tmp_path / "run", "restart"), "another run .*sweep/one\\) lies in it")
    monkeypatch.chdir(tmp_path / "run" / "checkpoints")
    refuse(made(toy, tmp_path / "run", "restart"), "the working folder .* lies in it")
    assert "precious" in str(files(tmp_path / "run"))


def test_a_folder_that_cannot_be_renamed_is_left_as_it_is(toy: Toy, tmp_path: Path, monkeypatch):
    begun(toy, tmp_path / "run")
    before = files(tmp_path)

    def busy(self: Path, target: Path) -> None:
        raise OSError(16, "Device or resource busy")

    monkeypatch.setattr(Path, "rename", busy)  # as for a mount point
    with pytest.raises(RunFolderError, match="cannot be moved aside: .*busy; move it yourself, or choose another"):
        run_folder.take(made(toy, tmp_path / "run", "restart"), {})
    assert files(tmp_path) == before


@pytest.mark.parametrize("content", [b"", b"\0\xff\xfe", b"- a\n- b\n", b"7", b"a: [", b"!!python/object:os.system x"])
def test_a_damaged_record_of_options_is_said_and_kept(toy: Toy, tmp_path: Path, content: bytes):
    begun(toy, tmp_path / "run")
    (tmp_path / "run" / "config.yaml").write_bytes(content)
    before = files(tmp_path)
    refuse(made(toy, tmp_path / "run"), "(?s)config.yaml (cannot be read|holds no configuration).*restore it, choose")
    assert files(tmp_path) == before


def test_killed_before_anything_was_recorded_is_gone_on_with(toy: Toy, tmp_path: Path):
    run_folder.take(made(toy, tmp_path / "run"), {}).lease.release()
    (tmp_path / "run" / "config.yaml").unlink()
    assert run_folder.check(made(toy, tmp_path / "run"))


# Which launch began it ------------------------------------------------------------------------------------------------


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As the ranks of a torchrun are, whose process is this one's parent."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setattr(run_folder, "launcher", lambda: psutil.Process(os.getppid()))
    yield


@pytest.mark.parametrize("choice", ["restart", "fail", "resume"])
def test_a_restart_by_torchrun_goes_on_with_what_its_launch_began(toy, tmp_path, launched, monkeypatch, choice):
    config = made(toy, tmp_path / "run", choice)
    first = run_folder.take(config, {})
    first.lease.release()
    for hours in (-2, 0, 2):  # clocks and their zones say nothing
        for path in (tmp_path / "run").rglob("*"):
            os.utime(path, (time.time() + 3600 * hours,) * 2)
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
        again = run_folder.take(config, {})
        again.lease.release()
        assert again.resuming and again.moved is None and again.token != first.token


@pytest.mark.parametrize(
    ("other", "same"),
    [
        ({"process": [1, 2.0]}, False),
        ({"host": "elsewhere", "id": "none"}, False),
        ({"host": "elsewhere", "id": "job-7"}, True),
        ({"id": "job-7", "process": [1, 2.0]}, False),
        ({"host": 7}, False),
    ],
)
def test_a_restart_by_torchrun_is_not_taken_for_another_launch(toy, tmp_path, launched, monkeypatch, other, same):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job-7" if other.get("id") == "job-7" else "none")
    run_folder.take(made(toy, tmp_path / "run"), {}).lease.release()
    marker = json.loads((tmp_path / "run" / MARKER).read_text())
    marker["launch"] |= other
    (tmp_path / "run" / MARKER).write_text(json.dumps(marker))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    if same:
        assert run_folder.check(made(toy, tmp_path / "run", "fail"))
    else:
        refuse(made(toy, tmp_path / "run", "fail"), "holds a run already")


# One writer -----------------------------------------------------------------------------------------------------------


def test_a_second_process_is_refused_and_told_by_whom(toy: Toy, tmp_path: Path):
    taken = run_folder.take(made(toy, tmp_path / "run"), {})
    before = files(tmp_path)
    for choice in ("resume", "restart"):
        refuse(made(toy, tmp_path / "run", choice), f"is in use by process {os.getpid()} on .*, since 2")
    refuse(made(toy, tmp_path / "run", "fail"), "is in use by process|holds a run already")
    assert files(tmp_path) == before
    taken.lease.check()
    taken.lease.release()
    assert run_folder.check(made(toy, tmp_path / "run"))


def test_a_killed_process_leaves_the_folder_free(tmp_path: Path):
    program = (
        "import sys, pathlib; from lens_megatron.output.run_lease import RunLease; "
        "lease = RunLease(pathlib.Path(sys.argv[1])); print('has it', flush=True); sys.stdin.read()"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)],
        env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert child.stdout.readline() == "has it\n"
    with pytest.raises(FolderInUseError, match=f"process {child.pid} on"):
        RunLease(tmp_path)
    child.kill()
    child.communicate()
    lease = RunLease(tmp_path)
    lease.check()
    lease.release()


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lease, "WATCH_S", 2.0)
    monkeypatch.setattr(run_lease, "PROBE_S", 0.1)


def lease_of_another_machine(folder: Path) -> Owner:
    owner = Owner("elsewhere", "other-boot", 1, 1.0, "token", "yesterday")
    (folder / LEASE).write_text(json.dumps(asdict(owner)))
    return owner


def test_a_lease_of_another_machine_that_is_touched_is_respected(tmp_path: Path, hasty):
    lease_of_another_machine(tmp_path)
    program = "import os, sys, time\nwhile True: os.utime(sys.argv[1]); time.sleep(0.1)"
    toucher = subprocess.Popen([sys.executable, "-c", program, str(tmp_path / LEASE)])
    try:
        with pytest.raises(FolderInUseError, match="in use by process 1 on elsewhere, since yesterday"):
            RunLease(tmp_path)
    finally:
        toucher.kill()
        toucher.wait()


def test_a_lease_of_another_machine_that_nobody_touches_is_taken_over(tmp_path: Path, hasty):
    lease_of_another_machine(tmp_path)
    lease = RunLease(tmp_path)
    lease.check()
    lease_of_another_machine(tmp_path)  # which had only been slow
    with pytest.raises(FolderInUseError, match="was taken over by process 1 on elsewhere"):
        lease.check()
    lease.release()
    assert (tmp_path / LEASE).exists(), "the lease is the other's"


def test_where_the_file_system_has_no_locks_the_lease_decides(tmp_path: Path, hasty, monkeypatch):
    def unsupported(descriptor: int, operation: int) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(run_lease.fcntl, "flock", unsupported)
    first = RunLease(tmp_path)
    with pytest.raises(FolderInUseError, match=f"process {os.getpid()} on"):
        RunLease(tmp_path)
    dead = replace(first.owner, started=1.0)
    (tmp_path / LEASE).write_text(json.dumps(asdict(dead)))
    RunLease(tmp_path).release()


@pytest.mark.parametrize("content", ["", "{", "[]", "7", '{"host": 1}', "\0"])
def test_a_damaged_lease_is_none(tmp_path: Path, content: str):
    (tmp_path / LEASE).write_text(content)
    RunLease(tmp_path).release()


def test_a_folder_that_has_gone_is_noticed(toy: Toy, tmp_path: Path):
    taken: RunFolder = run_folder.take(made(toy, tmp_path / "run"), {})
    (tmp_path / "run").rename(tmp_path / "away")
    with pytest.raises(FolderInUseError, match="was moved or deleted while this run was writing to it"):
        taken.lease.check()
    taken.lease.release()


def test_another_folder_than_rank_0s_is_noticed(toy: Toy, tmp_path: Path):
    taken = run_folder.take(made(toy, tmp_path / "run"), {})
    run_folder.check_shared(made(toy, tmp_path / "run"), taken.token, patience_s=0)
    taken.lease.release()
    for folder in ("run", "unshared"):
        with pytest.raises(RunFolderError, match="is not the folder that rank 0 writes to.*file system that all nodes"):
            run_folder.check_shared(made(toy, tmp_path / folder), "another token", patience_s=0)
    assert not (tmp_path / "unshared").exists()


# Whole runs -----------------------------------------------------------------------------------------------------------


def wait_for(condition, process: subprocess.Popen, seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "it ended too early"
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.02)


def endless(toy: Toy, tmp_path: Path, **options: object) -> dict:
    """The configuration of a run that goes on for longer than a test."""
    return toy.tree(tmp_path / "run", train={"steps": 10_000, "save_interval": 1}, run=options)


def test_a_second_trainer_ends_with_2_and_ranks_end_after_their_torchrun(toy: Toy, tmp_path: Path):
    checkpoints = tmp_path / "run" / "checkpoints"
    with (tmp_path / "first.log").open("wb") as log:
        outputs = {"stdout": log, "stderr": log, "start_new_session": True}
        words = command(endless(toy, tmp_path), tmp_path / "first", 1)
        first = subprocess.Popen(words, env=environment(), **outputs)
    try:
        wait_for(lambda: list(checkpoints.glob("iter_*")), first)
        tree = endless(toy, tmp_path, if_exists="restart")
        said = run_program(tree, tmp_path / "second", 1, status=ExitCode.MISTAKE).stdout
        assert "error: run.directory" in said and "is in use by process" in said
        rows = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
        assert rows == list(range(rows[0], rows[0] + len(rows))), "another trainer has written"
        ranks = psutil.Process(first.pid).children(recursive=True)
        first.kill()
        first.wait()
        gone, alive = psutil.wait_procs(ranks, timeout=120)
        assert not alive, "ranks go on without their torchrun"
    finally:
        for process in psutil.Process(first.pid).children(recursive=True) if psutil.pid_exists(first.pid) else []:
            process.kill()
        first.kill()
    assert "torchrun (process" in (tmp_path / "first.log").read_text()
    assert run_folder.check(made(toy, tmp_path / "run", train={"steps": 10_000, "save_interval": 1}))


MISTAKE_ON_RANK_1 = """
import os, sys
from lens_megatron import train
rank = os.environ["RANK"]
sys.exit(train.main([*sys.argv[1:3], *(sys.argv[3:] if rank == "1" else [])]))
"""


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.path=/nowhere", "model.path /nowhere: no config.json there"),
        pytest.param("data.train=/nowhere.jsonl", "/nowhere.jsonl", marks=pytest.mark.slow),
        pytest.param("reward.grader=graders:no_such", "cannot be loaded: AttributeError", marks=pytest.mark.slow),
    ],
)
def test_a_mistake_on_another_rank_is_said(toy: Toy, tmp_path: Path, override: str, message: str):
    entry = tmp_path / "entry.py"
    entry.write_text(MISTAKE_ON_RANK_1)
    config = write_config(toy.tree(tmp_path / "run"), tmp_path)
    with start_ranks(2, entry, "--config", config, override, together=False) as ranks:
        codes, said = ranks.wait(), ranks.stdout_of(1)
    assert codes[1] == ExitCode.MISTAKE and codes[0] != 0
    assert f"rank 1: error: {message}" in said or message in said.split("rank 1: error: ")[1]
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_what_all_ranks_find_is_said_once(toy: Toy, tmp_path: Path):
    arguments = command(toy.tree(tmp_path / "run"), tmp_path, 2)
    result = subprocess.run([*arguments, "lens.tua=1"], env=environment(), capture_output=True, text=True, timeout=300)
    assert result.returncode == 1
    assert result.stdout.count("error: unknown option lens.tua; did you mean lens.tau?") == 1, result.stdout


@pytest.mark.slow
def test_folders_that_ranks_do_not_share_end_the_run_with_the_reason(toy: Toy, tmp_path: Path):
    """One rank has a run to resume, the other an empty folder."""
    tree = toy.tree("run", run={"directory": "run"})
    for rank in range(2):
        (tmp_path / f"node{rank}").mkdir()
    launch(toy.tree(tmp_path / "node0" / "run"), tmp_path / "before", 1)
    script = f'cd {tmp_path}/node$RANK && exec {sys.executable} {ROOT}/pretrain_lens.py "$@"'
    command(tree, tmp_path, 2)
    result = subprocess.run(
        [*torchrun(2), "--no-python", "bash", "-c", script, "run", "--config", str(tmp_path / "config.yaml"),
         "train.steps=4"],
        env=environment(), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert result.returncode == 1, result.stdout + result.stderr
    assert "is not the folder that rank 0 writes to" in result.stdout
    assert not (tmp_path / "node1" / "run").exists()


def test_a_run_in_the_same_process_gives_the_folder_free(toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture):
    assert signal.getsignal(signal.SIGTERM) is not None
    command(toy.tree(tmp_path / "run", train={"steps": 1, "save_interval": 1}), tmp_path, 1)
    for _ in range(2):
        assert train.main(["--config", str(tmp_path / "config.yaml")]) == 0
    assert "has done its 1 steps already" in capsys.readouterr().out
    assert not (tmp_path / "run" / LEASE).exists()

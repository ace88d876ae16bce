"""Disks without room, and files that cannot be written: what a run can do without costs a warning, and comes later."""

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_time import PATIENCE_S, wait_until
from toy_runs import Toy, command, environment, launch, start_ranks

from lens_megatron.files import append_whole
from lens_megatron.output import report
from lens_megatron.output.metrics import MetricsWriter, read_metrics
from lens_megatron.output.side_log import SideLog
from lens_megatron.output.trackers.tensorboard_tracker import TensorBoardTracker
from lens_megatron.rollout.servers.process import ServerProcess

WORKER = Path(__file__).with_name("rollout_files_worker.py")


def mounted(folder: Path, size: str) -> bool:
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True)
    return done.returncode == 0


@pytest.fixture
def small_disk(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A file system of its own, of 256 KiB or of the test's parameter. Mounting needs root."""
    folder = tmp_path / "disk"
    if not mounted(folder, getattr(request, "param", "256k")):
        pytest.skip("no right to mount a file system")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(disk: Path) -> Path:
    """Leaves no byte free."""
    path = disk / "filler"
    with suppressed_full(), path.open("ab", buffering=0) as file:
        for size in (1 << 20, 1 << 10, 1):
            with suppressed_full():
                while True:
                    file.write(b"x" * size)
    return path


class suppressed_full:
    def __enter__(self) -> None: ...

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> bool:
        return isinstance(error, OSError)


def test_what_is_appended_is_whole_or_not_there(small_disk: Path):
    path = small_disk / "log"
    append_whole(path, b"first\n")
    filler = fill(small_disk)
    os.truncate(filler, filler.stat().st_size - 4096)
    with pytest.raises(OSError, match="No space left"):
        append_whole(path, b"y" * 20_000 + b"\n")
    assert path.read_bytes() == b"first\n"
    filler.unlink()
    append_whole(path, b"second\n")
    assert path.read_bytes() == b"first\nsecond\n"


def test_a_log_says_once_that_it_cannot_be_written_and_loses_nothing(
    small_disk: Path, caplog: pytest.LogCaptureFixture
):
    caplog.set_level("INFO", "lens_megatron")
    log = SideLog(small_disk / "log", b"")
    log.append(b"0\n")
    filler = fill(small_disk)
    for number in range(1, 4):
        log.append(f"{number}".encode() * 5000 + b"\n")
    (said,) = caplog.messages
    assert "No space left" in said and str(small_disk / "log") in said
    filler.unlink()
    log.append(b"4\n")
    assert caplog.messages[1:] == [f"{small_disk / 'log'} can be written again; nothing is lost"]
    assert [line[:1] for line in (small_disk / "log").read_text().splitlines()] == list("01234")
    fill(small_disk)
    log.append(b"5" * 5000 + b"\n")
    log.close()
    assert caplog.messages[-1] == f"{small_disk / 'log'} lacks its last 1 records"


def test_a_log_whose_folder_has_gone(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    log = SideLog(tmp_path / "run" / "folder" / "log", b"")
    log.append(b"1\n")
    (said,) = caplog.messages
    assert "No such file" in said
    (tmp_path / "run").mkdir()
    log.append(b"2\n")
    assert (tmp_path / "run" / "folder" / "log").read_bytes() == b"1\n2\n"


def test_metrics_and_tensorboard_outlive_a_full_disk(
    small_disk: Path, capsys: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture
):
    caplog.set_level("INFO", "lens_megatron")
    writer = MetricsWriter(small_disk, first_step=1, trackers=[TensorBoardTracker(small_disk, 1)])
    values = {f"name_{i}": float(i) for i in range(200)}
    writer.write(1, values)
    filler = fill(small_disk)
    for step in (2, 3):
        writer.write(step, values)
    filler.unlink()
    writer.write(4, values)
    writer.close()
    assert [row["step"] for row in map(json.loads, (small_disk / "metrics.jsonl").open())] == [1, 2, 3, 4]
    events = EventAccumulator(str(small_disk / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("name_7")] == [(step, 7.0) for step in (1, 2, 3, 4)]
    assert len(caplog.messages) == 4 and "Traceback" not in capsys.readouterr().err, caplog.text


def test_tensorboard_forgets_steps_that_are_done_again(tmp_path: Path):
    for first, value in ((1, 0.5), (2, 0.75)):
        writer = MetricsWriter(tmp_path, first_step=first, trackers=[TensorBoardTracker(tmp_path, first)])
        for step in range(first, 4):
            writer.write(step, {"name": value})
        writer.close()
        (path,) = (path for path in (tmp_path / "tensorboard").iterdir() if not path.name.endswith(".done"))
        path.rename(f"{path}.{first}.done")  # by name, TensorBoard reads the older one first
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("name")] == [(1, 0.5), (2, 0.75), (3, 0.75)]


def test_garbage_among_metrics_is_dropped_and_every_step_is_kept_once(tmp_path: Path):
    rows = [b'{"step": 0}', b"\xff\xfe\x00", b"[" * 100_000, b"17", b'{"step": "1"}', b'{"st', b'{"step": 1, "a": 1}',
            b'{"step": 1, "a": 2}', b'{"step": 2}', b'{"step": 3']  # fmt: skip
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(rows))
    assert [row["step"] for row in read_metrics(tmp_path)] == [0, 1, 2]
    writer = MetricsWriter(tmp_path, first_step=2)
    writer.write(2, {"a": 3.0})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert [json.loads(line) for line in text.splitlines()] == [{"step": 0}, {"step": 1, "a": 2}, {"step": 2, "a": 3.0}]


def test_a_summary_that_cannot_be_written_is_printed_all_the_same(tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "val-core/x/acc/mean@1": 0.5}\n')
    (tmp_path / "learning_curve.png").mkdir()
    text = report.write(tmp_path)
    assert "accuracy on x: 50.0 % before" in text and "learning_curve.png cannot be written" in text
    assert (tmp_path / "summary.txt").read_text() in text
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl", "learning_curve.png", "summary.txt"}


def test_a_console_on_a_full_disk_ends_no_run():
    program = (
        "import sys; from lens_megatron.output.console import leave_console, print_text; "
        "print_text('x'); print_text('y'); leave_console(); "
        "sys.stderr.write('done')"
    )
    buffered = {name: value for name, value in environment().items() if name != "PYTHONUNBUFFERED"}
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", program], stdout=full, stderr=subprocess.PIPE, env=buffered)
    assert (done.returncode, done.stderr) == (0, b"done")


def test_one_rank_cannot_write_its_part(tmp_path: Path):
    """Nobody waits for it, and no file lacks a part. Files that were asked for are refused on every rank."""
    with start_ranks(2, WORKER, tmp_path) as ranks:
        assert ranks.wait() == [0, 0], ranks.stderr()
        said = [ranks.stdout_of(rank).splitlines() for rank in range(2)]
    lost = f"warning: rollouts cannot be written to {tmp_path} at step "
    refused = f"refused: debug.save_rollouts cannot be written to {tmp_path} at step "
    expected = [
        ["rollouts can be written again; lost: step 2", lost + "4: ", "rollouts can be written again; lost: step 4",
         refused + "2: another rank could not write", refused + "4: [Errno 21]"],
        ["rank 1: " + lost + "2: ", refused + "2: [Errno 21]", refused + "4: another rank could not write"],
    ]  # fmt: skip
    for lines, beginnings in zip(said, expected, strict=True):
        assert len(lines) == len(beginnings), said
        assert all(line.startswith(start) for line, start in zip(lines, beginnings, strict=True)), said
    whole = [path for path in tmp_path.glob("step_*.jsonl") if path.is_file()]
    assert sorted(path.name for path in whole) == [f"step_00000{step}.jsonl" for step in (1, 3, 5)]
    for path in whole:
        step = int(path.stem[-1])
        assert path.read_text() == f"step {step} rank 0\nstep {step} rank 1\n"
    assert not [path for path in tmp_path.glob(".step_*") if path.is_file()]


@pytest.mark.parametrize("across", [False, True])
def test_a_servers_log_moves_into_a_run_folder_of_another_file_system(across: bool, tmp_path: Path, small_disk: Path):
    folder = (small_disk if across else tmp_path) / "servers"
    process = ServerProcess("server 0", {}, tmp_path / ".run_server_0.log")
    output: io.FileIO = process.log.open("ab", buffering=0)
    output.write(b"before\n")
    process.move_log(folder)
    output.write(b"after\n")
    assert process.tail() == "before\nafter"
    output.close()
    process.keep_log()
    assert (folder / "server_0.log").read_text() == "before\nafter\n"
    assert not (tmp_path / ".run_server_0.log").exists()


def test_a_restart_before_the_first_checkpoint_has_one_row_of_step_0(toy: Toy, tmp_path: Path):
    tree = toy.tree(tmp_path / "run", data={"eval": [str(toy.eval)]}, train={"steps": 1, "save_interval": 1})
    launch(tree, tmp_path, 1)
    for path in sorted((tmp_path / "run" / "checkpoints").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    launch(tree, tmp_path, 1)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert [row["step"] for row in rows] == [0, 1]


@pytest.mark.slow
@pytest.mark.parametrize("small_disk", ["64m"], indirect=True)
def test_a_run_goes_on_while_its_disk_is_full(toy: Toy, tmp_path: Path, small_disk: Path):
    """The run's folder is the mount point of a small disk, which is full for a while between two checkpoints."""
    train = {"steps": 100_000, "save_interval": 100_000}
    tree = toy.tree(small_disk / "", run={"trackers": ["tensorboard"]}, train=train)
    output = (tmp_path / "output").open("w+")
    process = subprocess.Popen(command(tree, tmp_path, 2), env=environment(), stdout=output, stderr=output)

    def text() -> str:
        return Path(output.name).read_text()

    def step_after(step: int) -> None:
        lines = [f"iteration {number:6d}/" for number in range(step + 1, step + 200)]
        wait_until("a step", lambda: process.poll() is not None or any(line in text() for line in lines))
        assert process.poll() is None, text()[-6000:]

    try:
        step_after(0)
        filler = fill(small_disk)
        wait_until("a warning", lambda: process.poll() is not None or text().count("cannot be written") >= 3)
        step_after(len(read_metrics(small_disk)) + 5)
        filler.unlink()
        wait_until("room", lambda: process.poll() is not None or text().count("can be written again") >= 3)
        assert process.poll() is None, text()[-6000:]
        psutil.Process(process.pid).children()[0].send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_S) == 0, text()[-6000:]
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(PATIENCE_S)
        output.close()
    assert "Traceback" not in text() and text().count("metrics.jsonl cannot be written") == 1, text()[-6000:]
    steps = [json.loads(line)["step"] for line in (small_disk / "metrics.jsonl").open()]
    assert steps == list(range(steps[-1] + 1)) or steps == list(range(1, steps[-1] + 1))
    files = list((small_disk / "rollouts").iterdir())
    assert len(files) < len(steps) and all(path.read_text().endswith("}\n") for path in files)
    assert (small_disk / "checkpoints" / f"iter_{steps[-1]:07d}").is_dir() and (small_disk / "summary.txt").is_file()

"""Starts ranks as forks of one process that has imported the trainer: imports take nine tenths of a short run.

Each rank is a process of its own with the environment that torchrun would give it. What torchrun does besides is
missing: restarts, signals that are passed on, a parent to watch. Tests of these start torchrun.

    test ── lines of JSON, each a `Job` ──► python warm_ranks.py ── forks ──► a launcher per job ── forks ──► ranks

The launcher writes what the test waits for into the job's folder: `begun`, then `ended`.
"""

import atexit
import functools
import gc
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

GRACE_S = 30
"""Time that the other ranks have to end after one of them failed, as under torchrun."""
POLL_S = 0.01
PATIENCE_S = 300.0
"""Time that a job has, and a text that a test waits for."""
BEGUN, ENDED = "begun", "ended"
"""Files of a job's folder: the ranks' process ids and their port; their exit codes."""


@dataclass(frozen=True)
class Job:
    """A program to be run by `ranks` processes."""

    words: list[str]
    """The program's path and its arguments."""
    ranks: int
    environment: dict[str, str]
    folder: str
    """Where the output of rank N goes, into files `stdout_N` and `stderr_N`."""
    timeout_s: float
    together: bool
    """Whether the other ranks are told to end when one fails, as torchrun does."""
    finalize: bool
    """Whether the interpreter takes everything apart at the end of a rank, which takes a second."""


class Ranks:
    """Processes that run a program. `pids` are theirs, rank by rank; `port` is the MASTER_PORT of all."""

    def __init__(self, job: Job):
        self.job, self._folder = job, Path(job.folder)
        server = _server()
        server.stdin.write(json.dumps(asdict(job)) + "\n")
        server.stdin.flush()
        begun = self._read(BEGUN)
        self.pids: list[int] = begun["pids"]
        self.port: int = begun["port"]

    def stdout(self) -> str:
        """What all ranks have printed so far, one after the other."""
        return self._output("stdout")

    def stderr(self) -> str:
        return self._output("stderr")

    def stdout_of(self, rank: int) -> str:
        return (self._folder / f"stdout_{rank}").read_text()

    def stderr_of(self, rank: int) -> str:
        return (self._folder / f"stderr_{rank}").read_text()

    def await_stdout(self, text: str) -> None:
        """Waits until `text` has been printed. Fails with the output when the ranks end before."""
        deadline = time.monotonic() + PATIENCE_S
        while text not in self.stdout():
            assert self.runs(), f"ended without {text!r}: " + self.stdout() + self.stderr()
            assert time.monotonic() < deadline, f"{text!r} did not come: " + self.stdout() + self.stderr()
            time.sleep(POLL_S)

    def runs(self) -> bool:
        """Whether any of them still runs."""
        return not (self._folder / ENDED).exists()

    def send(self, number: signal.Signals, rank: int | None = None) -> None:
        """Sends a signal to one rank, or to all that still run."""
        if self.runs():
            _send(number, self.pids if rank is None else [self.pids[rank]])

    def await_end_of(self, rank: int) -> None:
        """Waits until this rank has ended, whatever the others do."""
        while self.runs() and Path(f"/proc/{self.pids[rank]}").exists():
            time.sleep(POLL_S)

    def wait(self) -> list[int]:
        """Waits for the end of all. Returns their exit codes, of which -N stands for a signal."""
        return self._read(ENDED)

    def _output(self, name: str) -> str:
        files = (self._folder / f"{name}_{rank}" for rank in range(self.job.ranks))
        return "".join(file.read_text(errors="replace") for file in files if file.exists())

    def _read(self, name: str) -> Any:
        deadline = time.monotonic() + self.job.timeout_s + GRACE_S  # the launcher keeps to an earlier one
        while not (self._folder / name).exists():
            assert _server().poll() is None, "the process that forks launchers has ended"
            assert time.monotonic() < deadline, "a launcher has ended"
            time.sleep(POLL_S)
        return json.loads((self._folder / name).read_text())


@contextmanager
def started(
    words: Sequence[str | Path],
    ranks: int,
    environment: dict[str, str],
    timeout_s: float = PATIENCE_S,
    *,
    together: bool = True,
    finalize: bool = False,
) -> Iterator[Ranks]:
    """Starts the program for the block. Ranks that still run at its end, or after `timeout_s`, are killed."""
    with tempfile.TemporaryDirectory() as folder:
        running = Ranks(Job([str(word) for word in words], ranks, environment, folder, timeout_s, together, finalize))
        try:
            yield running
        finally:
            running.send(signal.SIGKILL)
            running.wait()


def run(
    words: Sequence[str | Path], ranks: int, environment: dict[str, str], timeout_s: float
) -> subprocess.CompletedProcess:
    """Runs the program to its end. The status is the first one of a rank that is not 0; -9 after `timeout_s`."""
    with started(words, ranks, environment, timeout_s) as running:
        code = next((code for code in running.wait() if code), 0)
        return subprocess.CompletedProcess(running.job.words, code, running.stdout(), running.stderr())


@functools.cache
def _server() -> subprocess.Popen:
    """This process's server, which ends with it."""
    from toy_runs import environment

    words = [sys.executable, __file__]
    server = subprocess.Popen(words, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)

    def stop() -> None:
        server.stdin.close()
        server.wait()

    atexit.register(stop)
    return server


def _serve() -> None:
    import lens_megatron.train  # noqa: F401

    gc.collect()
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for launchers
    for line in sys.stdin:
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            _launch(Job(**json.loads(line)))


def _launch(job: Job) -> NoReturn:
    """Runs a job in this process, which is a fork."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    children: list[int] = []
    for rank in range(job.ranks):
        children.append(os.fork())
        if children[-1] == 0:
            _become(job, rank, port)
            (sys.exit if job.finalize else _leave)(_run(job.words))
    _tell(job, BEGUN, {"pids": children, "port": port})
    _tell(job, ENDED, _wait(children, time.monotonic() + job.timeout_s, job.together))
    os._exit(0)


def _tell(job: Job, name: str, content: object) -> None:
    """Writes a file that is whole as soon as it is there."""
    whole = Path(job.folder, f".{name}")
    whole.write_text(json.dumps(content))
    whole.rename(Path(job.folder, name))


def _become(job: Job, rank: int, port: int) -> None:
    """Gives this process, which is a fork, the output and the environment of a rank."""
    for descriptor, path, flags in (
        (0, os.devnull, os.O_RDONLY),
        (1, f"{job.folder}/stdout_{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND),
        (2, f"{job.folder}/stderr_{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND),
    ):
        opened = os.open(path, flags)
        os.dup2(opened, descriptor)
        os.close(opened)
    given = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": job.ranks, "LOCAL_WORLD_SIZE": job.ranks}
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.clear()
    os.environ.update(job.environment | {name: str(value) for name, value in (given | place).items()})


def _run(words: Sequence[str]) -> int:
    """Runs the program in this process, as the interpreter would. Returns its exit code."""
    sys.argv, sys.path[0] = list(words), str(Path(words[0]).parent)
    asked = os.environ.get("PYTHONPATH", "").split(os.pathsep)  # an interpreter reads it once, when it starts
    sys.path[1:1] = [path for path in asked if path and path not in sys.path]
    try:
        runpy.run_path(words[0], run_name="__main__")
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _leave(code: int) -> NoReturn:
    """Ends this process as the interpreter would, but does not take apart what was imported."""
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _wait(children: Sequence[int], deadline: float, together: bool) -> list[int]:
    """Exit codes of all. When one fails, the others may be told to end, and are then killed later."""
    codes: dict[int, int] = {}
    while len(codes) < len(children):
        for child in set(children) - codes.keys():
            ended, status = os.waitpid(child, os.WNOHANG)
            if not ended:
                continue
            codes[child] = os.waitstatus_to_exitcode(status)
            if codes[child] and together:
                deadline = min(deadline, time.monotonic() + GRACE_S)
                _send(signal.SIGTERM, set(children) - codes.keys())
        if time.monotonic() > deadline:
            _send(signal.SIGKILL, set(children) - codes.keys())
            deadline = float("inf")
        time.sleep(POLL_S)
    return [codes[child] for child in children]


def _send(number: signal.Signals, children: Sequence[int] | set[int]) -> None:
    for child in children:
        with suppress(ProcessLookupError):  # it has ended
            os.kill(child, number)


if __name__ == "__main__":
    _serve()

"""Starts ranks as forks of one process that has imported the trainer: imports take nine tenths of a short run.

Each rank is a process of its own with the environment that torchrun would give it. What torchrun does besides is
missing (restarts, signals that are passed on, a parent to watch), and so is the end of the interpreter, with which the
shared memory of vLLM's groups would end. Tests of these start torchrun.

    python warm_ranks.py     answers each line of JSON on standard input, a `Job`, with a line: the ranks' exit codes
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
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn

GRACE_S = 30
"""Time that the other ranks have to end after one of them failed, as under torchrun."""


@dataclass(frozen=True)
class Job:
    """A program to be run by `ranks` processes, whose output goes into the files `stdout` and `stderr`."""

    words: list[str]
    """The program's path and its arguments."""
    ranks: int
    environment: dict[str, str]
    stdout: str
    stderr: str
    timeout_s: float


def run(words: Sequence[str], ranks: int, environment: dict[str, str], timeout_s: float) -> subprocess.CompletedProcess:
    """Runs the program to its end. The status is the first one of a rank that is not 0; -9 after `timeout_s`."""
    with tempfile.TemporaryDirectory() as folder:
        stdout, stderr = Path(folder, "stdout"), Path(folder, "stderr")
        server = _server()
        job = Job(list(words), ranks, environment, str(stdout), str(stderr), timeout_s)
        server.stdin.write(json.dumps(asdict(job)) + "\n")
        server.stdin.flush()
        codes = json.loads(server.stdout.readline())
        code = next((code for code in codes if code), 0)
        return subprocess.CompletedProcess(list(words), code, stdout.read_text(), stderr.read_text())


@functools.cache
def _server() -> subprocess.Popen:
    """This process's server, which ends with it."""
    from toy_runs import environment

    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    server = subprocess.Popen([sys.executable, __file__], env=environment(), **pipes)

    def stop() -> None:
        server.stdin.close()
        server.wait()

    atexit.register(stop)
    return server


def _serve() -> None:
    import lens_megatron.train  # noqa: F401

    gc.collect()
    gc.freeze()

    for line in sys.stdin:
        job = Job(**json.loads(line))
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        children: list[int] = []
        for rank in range(job.ranks):
            children.append(os.fork())
            if children[-1] == 0:
                _become(job, rank, port)
                _leave(_run(job.words))
        print(json.dumps(_wait(children, time.monotonic() + job.timeout_s)), flush=True)


def _become(job: Job, rank: int, port: int) -> None:
    """Gives this process, which is a fork, the output and the environment of a rank."""
    for descriptor, path, flags in (
        (0, os.devnull, os.O_RDONLY),
        (1, job.stdout, os.O_WRONLY | os.O_CREAT | os.O_APPEND),
        (2, job.stderr, os.O_WRONLY | os.O_CREAT | os.O_APPEND),
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
    """Ends this process as the interpreter would, but does not take apart what was imported, which takes a second."""
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _wait(children: Sequence[int], deadline: float) -> list[int]:
    """Exit codes of all. When one fails, the others are told to end, and killed later."""
    codes: dict[int, int] = {}
    while len(codes) < len(children):
        for child in set(children) - codes.keys():
            ended, status = os.waitpid(child, os.WNOHANG)
            if not ended:
                continue
            codes[child] = os.waitstatus_to_exitcode(status)
            if codes[child]:
                deadline = min(deadline, time.monotonic() + GRACE_S)
                _send(signal.SIGTERM, set(children) - codes.keys())
        if time.monotonic() > deadline:
            _send(signal.SIGKILL, set(children) - codes.keys())
            deadline = float("inf")
        time.sleep(0.01)
    return [codes[child] for child in children]


def _send(number: signal.Signals, children: set[int]) -> None:
    for child in children:
        os.kill(child, number)


if __name__ == "__main__":
    _serve()

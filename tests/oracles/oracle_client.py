"""verl and TRL as oracles, each in a process of its own."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / ".oracles"


class Oracle:
    """Functions of a library, called in another process: `oracle_worker.py` says which."""

    def __init__(self, process: subprocess.Popen[str], log: Path) -> None:
        self.process, self.log = process, log

    def __call__(self, function: str, /, **arguments: Any) -> Any:
        """Returns the function's value. Tensors are given and come back as lists, numbers as float64."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps([function, arguments], default=lambda tensor: tensor.tolist()) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, f"the oracle's process has ended:\n{self.log.read_text()[-4000:]}"
        answer = json.loads(line)
        assert "error" not in answer, answer["error"]
        return answer["value"]


def make_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets graders import the libraries, which stand behind all that is installed."""
    monkeypatch.setattr(sys, "path", [*sys.path, str(FOLDER)])


def start(library: str, folder: Path) -> Iterator[Oracle]:
    if not (FOLDER / library).is_dir():
        pytest.skip(f"{library} is not in {FOLDER.name}; run `make oracles`")
    log = folder / f"{library}.log"
    command = [sys.executable, str(Path(__file__).with_name("oracle_worker.py")), str(FOLDER), f"{library}_functions"]
    with (
        log.open("w") as errors,
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=folder
        ) as process,
    ):
        yield Oracle(process, log)  # Popen closes the input when it leaves, by which the process ends

"""Runs the trainer's checks on inputs that cannot be used: each must end with status 2 and one message, before
anything is written.

No check may hang, so each has ten seconds. No check may accept the input: the trainer stops where it would take the
device.
"""

import json
import os
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from toy_runs import Toy

from lens_megatron import train

PATIENCE_S = 10
LONG = 300 * "n"
VERY_LONG = "/" + 1_000 * "long/"
HUGE = "1" + 400 * "0"


class Accepted(Exception):
    """The input passed every check."""


class Hung(BaseException):
    """No Exception, which the trainer might take for the input's."""


@dataclass(frozen=True)
class Trainer:
    """The trainer's checks on inputs in `folder`, in this process."""

    toy: Toy
    folder: Path
    capsys: pytest.CaptureFixture

    def refusal(self, *overrides: str, config: Path | str | None = None, **sections: dict) -> str:
        """The error's message. Fails unless the status is 2 and nothing was written."""
        path = self.folder / "config.yaml" if config is None else config
        if config is None:
            path.write_text(yaml.safe_dump(self.toy.tree(self.folder / "run", **sections)))
        before = names(self.folder)
        with limited():
            status = train.main(["--config", str(path), *(text.replace("TMP", str(self.folder)) for text in overrides)])
        printed = self.capsys.readouterr().out
        assert status == 2 and "Traceback" not in printed
        assert names(self.folder) == before and not (self.folder / "run").exists()
        errors = [line for line in printed.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1 and len(printed) < 20_000, printed[:3_000]
        return printed.partition("error: ")[2]


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


class limited:
    """Raises Hung in the block after PATIENCE_S."""

    def __enter__(self) -> None:
        def hang(number: int, frame: object) -> None:
            raise Hung

        self.before = signal.signal(signal.SIGALRM, hang)
        signal.alarm(PATIENCE_S)

    def __exit__(self, *_: object) -> None:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, self.before)


def odd_files(folder: Path) -> None:
    (folder / "file").write_text("text")
    (folder / "loop.jsonl").symlink_to(folder / "loop.jsonl")
    os.mkfifo(folder / "fifo.jsonl")
    (folder / "zero.jsonl").symlink_to("/dev/zero")


def model_copy(toy: Toy, folder: Path) -> Path:
    return shutil.copytree(toy.model, folder / "model")


def edited(model: Path, name: str, **values: object) -> None:
    (model / name).write_text(json.dumps(json.loads((model / name).read_text()) | values))

"""Knows the folder that `python -m lens_megatron.llm` fills: where its parts lie, and how they come to be whole.

One process at a time writes to it (`lock`). A part is made beside its place, in `.NAME.partial`, and renamed when it is
whole. A process that is killed leaves only hidden folders, which the next one removes.
"""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lens_megatron.errors import UserError
from lens_megatron.files import flush, why_no_folder

GB = 10**9


class LlmError(UserError):
    """A part of the language model cannot be made; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class LlmFolder:
    """The folder `root` and the places in it."""

    root: Path

    @property
    def wheels(self) -> Path:
        """The wheels as they came from the index."""
        return self.root / "wheels"

    @property
    def gguf(self) -> Path:
        """The folder with the quantised model."""
        return self.root / "gguf"

    @property
    def converter(self) -> Path:
        """Libraries that only the conversion needs, apart from the environment."""
        return self.root / "converter"

    @property
    def model(self) -> Path:
        """The instruct model as a Hugging Face directory."""
        return self.root / "model"

    @property
    def data(self) -> Path:
        """Problems and solutions as JSON lines."""
        return self.root / "data"

    @property
    def cold_start(self) -> Path:
        """The model after supervised fine-tuning, as a Hugging Face directory."""
        return self.root / "cold_start"

    @property
    def checkpoints(self) -> Path:
        """The states of a cold start that is not complete."""
        return self.root / "cold_start_checkpoints"

    @property
    def evaluation(self) -> Path:
        """Measured accuracies, one file per model."""
        return self.root / "evaluation"


@contextmanager
def lock(root: Path) -> Iterator[None]:
    """Creates `root` and holds the right to write to it. The system releases it in whatever way the process ends.

    Raises:
        LlmError: another process has it, or the folder cannot be made or written to.
    """
    if why := why_no_folder(root):
        raise LlmError(f"--out {root}: {why}; choose another folder")
    try:
        root.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(root / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise LlmError(f"--out {root}: {error.strerror}; choose another folder") from error
    try:
        _take(descriptor, root)
        yield
    finally:
        os.close(descriptor)


def _take(descriptor: int, root: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = os.pread(descriptor, 20, 0).decode(errors="replace").strip() or "another"
        raise LlmError(
            f"--out {root} is in use by process {owner}; wait for it, stop it, or choose another folder"
        ) from None
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
    except OSError:
        pass  # the number only serves the message above, and a full disk has no room for it


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """Yields a new folder beside `target`, and puts it in the place of `target` when the block ends without an error.

    The caller holds the lock. Files are on the disk before the folder gets its name, so that not even a machine that
    stops leaves a part of it. What stood at `target` is replaced.
    """
    partial, old = (target.with_name(f".{target.name}.{suffix}") for suffix in ("partial", "old"))
    for left in (partial, old):
        shutil.rmtree(left, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        for path in sorted(partial.rglob("*")):
            flush(path)
        if target.exists():
            target.rename(old)
        partial.rename(target)
        flush(target.parent)
    finally:
        for left in (partial, old):
            shutil.rmtree(left, ignore_errors=True)


def check_room(root: Path, needed: int) -> None:
    """Raises LlmError where the disk has less than `needed` bytes free."""
    free = shutil.disk_usage(root).free
    if free < needed:
        raise LlmError(
            f"--out {root}: the disk has {free / GB:.1f} GB free, this part needs {needed / GB:.1f} GB; make room, or "
            "choose a folder on another disk"
        )


def tail(text: str, lines: int = 6) -> str:
    """Returns the last lines of another program's output that are not empty, as one line."""
    return " | ".join([line.strip() for line in text.splitlines() if line.strip()][-lines:])[-600:]

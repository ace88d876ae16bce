"""Lets one process at a time, on any machine, write to a run's folder.

    .lock         held with flock by the main rank while it lives; the kernel releases it in whatever way it ends
    .lease.json   names that process; touched every RENEW_S, read again before anything is published

The lock decides between processes of one machine. Between machines it may not (some network file systems keep locks to
each machine, or have none), so a launch elsewhere watches the lease: if it is still touched, its owner lives. The
clocks of two machines are never compared.
"""

import errno
import fcntl
import json
import logging
import os
import secrets
import socket
import threading
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import get_type_hints

import psutil

from lens_megatron.errors import UserError
from lens_megatron.files import write_atomically

logger = logging.getLogger(__name__)

LOCK, LEASE = ".lock", ".lease.json"
RENEW_S = 10.0
WATCH_S = 3.5 * RENEW_S
"""Seconds that a lease of another machine must stay untouched before its owner counts as gone."""
PROBE_S = 2.0
"""Seconds for which the lock is tried again: a launch that only checks the folder holds it for a moment."""
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


class FolderInUseError(UserError):
    """Another process writes to the folder; the message names it."""


@dataclass(frozen=True, slots=True)
class Owner:
    """The process that may write. Example: Owner("node7", "5f0c...", 4711, 1795278000.0, "9c41...", "17:40")."""

    host: str
    boot: str
    """The machine's boot id, which changes at every start: process numbers are valid for one boot only."""
    pid: int
    started: float
    """The time at which the process was created, by the clock of its own machine."""
    token: str
    since: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"

    @property
    def is_here(self) -> bool:
        return (self.host, self.boot) == (socket.gethostname(), _boot())

    @property
    def lives(self) -> bool:
        """Says whether the owner, which must be on this machine, still runs."""
        try:
            return abs(psutil.Process(self.pid).create_time() - self.started) < 1.0
        except psutil.Error:
            return False


class RunLease:
    """The right to write to `folder`, which must exist, until `release` or the end of the process.

    Raises:
        FolderInUseError: another process has it.
        OSError: the folder cannot be written.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            locked, before = _lock(self.descriptor, folder), read_owner(folder)
            elsewhere = before is not None and not before.is_here
            if before and (_is_touched(folder, before) if elsewhere else locked is None and before.lives):
                raise _refusal(folder, before)
            created = psutil.Process().create_time()
            now = time.strftime("%Y-%m-%d %H:%M:%S")
            self.owner = Owner(socket.gethostname(), _boot(), os.getpid(), created, secrets.token_hex(8), now)
            write_atomically(folder / LEASE, json.dumps(asdict(self.owner)) + "\n")
            if elsewhere or locked is None:
                time.sleep(PROBE_S)  # of two launches that found the same lease untouched, the later writer wins
                self.check()
        except BaseException:
            os.close(self.descriptor)
            raise
        self._released = threading.Event()
        threading.Thread(target=self._renew, name="run lease", daemon=True).start()

    def check(self) -> None:
        """Raises FolderInUseError when the folder has another owner by now, or is gone."""
        try:
            owner = read_owner(self.folder)
        except OSError:
            return  # the owner cannot be read, and nothing can be published either
        if owner is None:
            raise FolderInUseError(f"run.directory {self.folder} was moved or deleted while this run was writing to it")
        if owner != self.owner:
            raise FolderInUseError(f"run.directory {self.folder} was taken over by {owner}; this run ends")

    def release(self) -> None:
        """Gives the right back. It is idempotent."""
        if self._released.is_set():
            return
        self._released.set()
        try:
            if read_owner(self.folder) == self.owner:
                (self.folder / LEASE).unlink()
        except OSError:
            pass  # the next launch finds that this process has ended
        os.close(self.descriptor)

    def _renew(self) -> None:
        while not self._released.wait(RENEW_S):
            try:
                if read_owner(self.folder) == self.owner:
                    os.utime(self.folder / LEASE)  # needs no room on the disk
            except OSError:
                pass  # it is tried again, and `check` tells the run


def refuse_if_in_use(folder: Path) -> None:
    """Raises FolderInUseError when a process of this machine writes to `folder`. Changes nothing, and does not wait."""
    try:
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return  # no process ever wrote to it, or none may
    try:
        _lock(descriptor, folder)
    finally:
        os.close(descriptor)


def read_owner(folder: Path) -> Owner | None:
    """Returns the owner, or None where no valid lease exists. Raises OSError where that cannot be determined."""
    try:
        record = json.loads((folder / LEASE).read_text(errors="replace"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    if not isinstance(record, dict) or record.keys() != {field.name for field in fields(Owner)}:
        return None
    owner = Owner(**record)
    kinds = get_type_hints(Owner)
    return owner if all(isinstance(getattr(owner, name), kind) for name, kind in kinds.items()) else None


def _lock(descriptor: int, folder: Path) -> bool | None:
    """Returns True if the lock is held now, None if this file system has no locks. Raises FolderInUseError."""
    deadline = time.monotonic() + PROBE_S
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise _refusal(folder, read_owner(folder)) from None
            time.sleep(0.05)
        except OSError as error:
            if error.errno in _NO_LOCKS:
                return None
            raise


def _is_touched(folder: Path, owner: Owner) -> bool:
    """Watches the lease of an owner on another machine for up to WATCH_S; returns whether it was touched."""
    first, deadline = _state(folder), time.monotonic() + WATCH_S
    logger.info(f"{folder}: the last owner was {owner}; watching for {WATCH_S:.0f} s whether it still lives")
    while time.monotonic() < deadline:
        time.sleep(min(1.0, WATCH_S / 10))
        if _state(folder) not in (first, None):
            return True
    return False


def _state(folder: Path) -> tuple[int, int] | None:
    """Returns inode and time of the lease. Opens the file, so that a network file system asks its server."""
    try:
        with (folder / LEASE).open("rb") as file:
            found = os.fstat(file.fileno())
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


def _refusal(folder: Path, owner: Owner | None) -> FolderInUseError:
    return FolderInUseError(
        f"run.directory {folder} is in use by {owner or 'another process'}; wait for it, stop it, or choose another "
        "folder"
    )


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""

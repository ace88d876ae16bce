"""Writes files that are whole or absent (written beside their place, flushed, then renamed), and reads users' files
without blocking."""

import errno
import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

_KINDS = {stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}


def open_regular(path: Path) -> BinaryIO:
    """Opens a user's file for reading. Does not block where `path` is a FIFO or a device.

    Raises:
        OSError: `strerror` says why, also for a name that no file can have and for a path that is no regular file.
    """
    try:
        _check_regular(os.stat(path).st_mode)  # before it is opened, since opening starts an action on some devices
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except ValueError:  # the name has a NUL byte, or half of a surrogate pair
        raise OSError(errno.EINVAL, "no file can have this name") from None
    file = os.fdopen(descriptor, "rb")
    try:
        _check_regular(os.fstat(descriptor).st_mode)
    except OSError:
        file.close()
        raise
    return file


def read_regular(path: Path, limit: int) -> bytes:
    """Returns a user's file, opened by `open_regular`. Raises OSError, also if it has more than `limit` bytes."""
    with open_regular(path) as file:
        content = file.read(limit + 1) or b""  # some files of /proc give None while they have no data
    if len(content) > limit:
        raise OSError(errno.EFBIG, f"it has more than {limit:,} bytes")
    return content


def why_no_folder(path: Path) -> str:
    """Returns why no folder can be made at `path`, or written to if it exists; empty if it can. Makes nothing."""
    try:
        above = next(part for part in (path, *path.absolute().parents) if os.path.lexists(part))
    except ValueError:
        return "no folder can have this name"
    if not os.path.exists(above):
        return f"{above} is a link that leads nowhere"
    if not above.is_dir():
        return f"{above} is a file, not a folder"
    return "" if os.access(above, os.W_OK | os.X_OK) else f"{above} may not be written to"


def _check_regular(mode: int) -> None:
    if stat.S_ISDIR(mode):
        raise OSError(errno.EISDIR, "it is a folder, not a file")
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, f"it is {_KINDS.get(stat.S_IFMT(mode), 'something else')}, not a file")


def write_atomically(path: Path, content: str | bytes, *, mode: int = 0o666) -> None:
    """Replaces `path`, which has its old or its new content at any time, even if the process or the machine stops.

    Args:
        mode: the permissions of a new file, before the umask is applied.

    Raises:
        OSError: `path` was not changed, and no temporary file is left beside it.
    """
    data = content.encode("utf-8", errors="backslashreplace") if isinstance(content, str) else content
    partial = path.with_name(f".{path.name[:200]}.{os.getpid()}.partial")
    try:
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.rename(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    flush(path.parent)


def append_whole(path: Path, data: bytes) -> None:
    """Appends to `path`, which it creates.

    Raises:
        OSError: the file was not changed.
    """
    size = None
    try:
        with path.open("ab") as file:
            size = file.tell()
            file.write(data)
    except OSError:
        if size is not None:
            with suppress(OSError):
                os.truncate(path, size)
        raise


def flush(path: Path) -> None:
    """Waits until a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

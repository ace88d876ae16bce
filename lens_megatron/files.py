"""Files that are whole or not there: written beside their place, flushed, then renamed into it."""

import os
from pathlib import Path


def write_atomically(path: Path, content: str | bytes, *, mode: int = 0o666) -> None:
    """Replaces `path`, which holds its old or its new content whenever the process or the machine stops.

    Args:
        mode: permissions of a new file, before the umask.

    Raises:
        OSError: nothing was changed, and nothing is left beside `path`.
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


def flush(path: Path) -> None:
    """Waits until a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

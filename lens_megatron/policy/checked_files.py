"""Writes files with size and checksum, which are computed from memory, and compares both when the files are read.

The checksum is XXH3-128, at some 10 GB/s per core: it detects damage, not forgery.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from stat import S_ISREG
from typing import Annotated

import torch
import xxhash
from pydantic import Field
from torch import Tensor

from lens_megatron.files import flush

_CHUNK = 8 << 20
_TYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
"""The names of torch's types in safetensors."""


class DamageError(ValueError):
    """A file is not what was written; the message names it, what was found and what was expected."""


@dataclass(frozen=True, slots=True)
class FileRecord:
    """Describes a file as it was written."""

    size: Annotated[int, Field(ge=0)]
    """The size in bytes."""
    checksum: str | None
    """XXH3-128 in hexadecimal digits; None for a file of a checkpoint from before there were checksums."""


def checksum(data: bytes) -> str:
    """Returns the XXH3-128 of `data` in hexadecimal digits."""
    return xxhash.xxh3_128_hexdigest(data)


def write_file(path: Path, data: bytes) -> FileRecord:
    """Writes `data` and waits until it is on the disk. Raises OSError."""
    with path.open("wb") as file:
        file.write(data)
    flush(path)
    return FileRecord(len(data), checksum(data))


def save_file(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> FileRecord:
    """Writes a safetensors file of tensors in host memory and waits until it is on the disk.

    The safetensors package writes such files too, but does not show the bytes that it writes.

    Raises:
        OSError: the file could not be written. KeyError: a tensor's type is not in `_TYPES`.
    """
    # Larger elements first, so that every tensor is aligned to its elements.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    header: dict[str, dict] = {"__metadata__": dict(metadata)}
    end = 0
    for name, tensor in ordered:
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _TYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = xxhash.xxh3_128()
    with path.open("wb") as file:
        for part in (len(text).to_bytes(8, "little"), text):
            digest.update(part)
            file.write(part)
        for _, tensor in ordered:
            flat = tensor.contiguous().as_strided((tensor.numel(),), (1,))  # a single element may have any stride
            data = flat.view(torch.uint8).numpy().data
            for start in range(0, len(data), _CHUNK):  # each chunk is summed while it is in the processor's cache
                digest.update(data[start : start + _CHUNK])
                file.write(data[start : start + _CHUNK])
    flush(path)
    return FileRecord(8 + len(text) + end, digest.hexdigest())


def check_size(path: Path, record: FileRecord) -> None:
    """Raises DamageError for a missing, truncated or overlong file, or one that cannot be looked at."""
    try:
        found = path.stat()
    except FileNotFoundError as error:
        raise DamageError(f"{path.name} is missing") from error
    except OSError as error:
        raise DamageError(f"{path.name} cannot be read: {error}") from error
    if not S_ISREG(found.st_mode):
        raise DamageError(f"{path.name} is no file")
    if found.st_size != record.size:
        raise DamageError(f"{path.name} has {found.st_size} bytes instead of {record.size}")


def check_content(path: Path, record: FileRecord) -> None:
    """Reads the file. Raises DamageError when it cannot be read or differs from what was written."""
    check_size(path, record)
    if record.checksum is None:
        return
    digest = xxhash.xxh3_128()
    try:
        with path.open("rb", buffering=0) as file:
            for chunk in _chunks(file):
                digest.update(chunk)
    except OSError as error:
        raise DamageError(f"{path.name} cannot be read: {error}") from error
    if digest.hexdigest() != record.checksum:
        raise DamageError(f"{path.name} has the checksum {digest.hexdigest()} instead of {record.checksum}")


def _chunks(file: FileIO) -> Iterator[memoryview]:
    buffer = memoryview(bytearray(_CHUNK))
    while count := file.readinto(buffer):
        yield buffer[:count]

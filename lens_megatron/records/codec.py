"""Turns records into bytes and back: the one form in which records travel between ranks and through the control store.

    8 bytes   hash of the record's layout: its name, and the names and types of its fields, of nested records too
    8 bytes   number of records
    ...       the fields of every record, in order, each as its type hint says, little-endian:

    int  8 bytes      float  8 bytes, to the bit      bool  1 byte      str  length, then UTF-8
    StrEnum  its place among the members      X | None  1 byte, then X if that is 1
    tuple[X, ...]  length, then the items      a frozen dataclass  its fields

Tuples of numbers are written and read by one call of `struct` each: the rest is the time in which Python makes the
numbers. Nothing in the bytes is executed, and no count in them is believed further than the bytes reach.
"""

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass
from enum import StrEnum
from functools import cache
from hashlib import blake2b
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

R = TypeVar("R")

_HEADER = struct.Struct("<8sQ")
_COUNT = struct.Struct("<Q")
_CODES: dict[object, str] = {int: "q", float: "d", bool: "?"}
"""The types whose tuples are written at once, with the codes that `struct` has for them."""


class _Reader:
    """Holds bytes, and how far they have been read."""

    def __init__(self, data: bytes | bytearray | memoryview):
        self.data, self.place = memoryview(data), 0

    def take(self, length: int) -> memoryview:
        """Returns the next `length` bytes. Raises ValueError where there are fewer."""
        left = len(self.data) - self.place
        if length > left:
            raise ValueError(f"{length} bytes were to follow byte {self.place}, and {left} do; the end is missing")
        self.place += length
        return self.data[self.place - length : self.place]

    def count(self) -> int:
        (count,) = _COUNT.unpack(self.take(_COUNT.size))
        return int(count)

    def values(self, code: str, count: int) -> tuple[Any, ...]:
        """Returns `count` numbers of the type that `struct` calls `code`."""
        return struct.unpack(f"<{count}{code}", self.take(count * struct.calcsize(f"<{code}")))


@dataclass(frozen=True, slots=True)
class _Form:
    """Says how the values of one type stand in the bytes."""

    layout: str
    """The type's name, and those of all its parts; types with equal layouts read each other's bytes."""
    write: Callable[[bytearray, Any], None]
    read: Callable[[_Reader], Any]


def encode(record_type: type[R], records: Sequence[R]) -> bytearray:
    """Returns the bytes from which `decode` makes equal records.

    Raises:
        TypeError: `record_type` has a field of a type that is not in the module's table.
        ValueError: a field holds what its type does not, or an integer of more than 64 bits.
    """
    form = _form(record_type)
    out = bytearray(_HEADER.pack(_hash(form), len(records)))
    for record in records:
        try:
            form.write(out, record)
        except (struct.error, AttributeError, TypeError) as error:
            raise ValueError(f"a {record_type.__name__} cannot be encoded: {error}") from error
    return out


def decode(record_type: type[R], data: bytes | bytearray | memoryview) -> list[R]:
    """Returns the records from which `encode` made `data`.

    Raises ValueError where `data` was made of another type of record, or of one with other fields, is cut off, goes on
    after the last record, or holds what the type does not.
    """
    form, reader = _form(record_type), _Reader(data)
    hashed, count = _HEADER.unpack(reader.take(_HEADER.size))
    if hashed != _hash(form):
        raise ValueError(
            f"the bytes begin with the layout {hashed.hex()}, that of {record_type.__name__} is {_hash(form).hex()}; "
            "run the same version of the project on every rank"
        )
    records = [form.read(reader) for _ in range(count)]
    if reader.place < len(data):
        raise ValueError(f"{len(data) - reader.place} bytes follow the last of {count} {record_type.__name__} records")
    return records


def _form(hint: Any) -> _Form:
    """Returns how values of type `hint` are written and read. Raises TypeError for a type not in the module's table."""
    arguments = get_args(hint)
    if hint in _CODES:
        return _number_form(hint)
    if hint is str:
        return _text_form()
    if isinstance(hint, type) and issubclass(hint, StrEnum):
        return _enum_form(hint)
    if isinstance(hint, type) and is_dataclass(hint) and fields(hint):
        return _record_form(hint)
    if get_origin(hint) is tuple and arguments[1:] == (Ellipsis,):
        item = arguments[0]
        return _numbers_form(item) if item in _CODES else _items_form(item)
    if get_origin(hint) in (Union, UnionType) and len(arguments) == 2 and NoneType in arguments:
        return _optional_form(next(argument for argument in arguments if argument is not NoneType))
    raise TypeError(f"a record has a field of type {hint}, which has no form in bytes; see lens_megatron.records.codec")


def _hash(form: _Form) -> bytes:
    return blake2b(form.layout.encode(), digest_size=8).digest()


def _number_form(hint: type) -> _Form:
    single = struct.Struct(f"<{_CODES[hint]}")

    def write(out: bytearray, value: float) -> None:
        out += single.pack(value)

    def read(reader: _Reader) -> Any:
        return single.unpack(reader.take(single.size))[0]

    return _Form(hint.__name__, write, read)


def _numbers_form(hint: type) -> _Form:
    code = _CODES[hint]

    def write(out: bytearray, values: tuple[float, ...]) -> None:
        out += struct.pack(f"<Q{len(values)}{code}", len(values), *values)

    def read(reader: _Reader) -> tuple[Any, ...]:
        return reader.values(code, reader.count())

    return _Form(f"tuple[{hint.__name__}]", write, read)


def _items_form(hint: Any) -> _Form:
    item = _form(hint)

    def write(out: bytearray, values: tuple[Any, ...]) -> None:
        out += _COUNT.pack(len(values))
        for value in values:
            item.write(out, value)

    def read(reader: _Reader) -> tuple[Any, ...]:
        return tuple([item.read(reader) for _ in range(reader.count())])

    return _Form(f"tuple[{item.layout}]", write, read)


def _text_form() -> _Form:
    def write(out: bytearray, text: str) -> None:
        data = text.encode("utf-8", errors="surrogatepass")  # data sets hold halves of surrogate pairs
        out += _COUNT.pack(len(data)) + data

    def read(reader: _Reader) -> str:
        return bytes(reader.take(reader.count())).decode("utf-8", errors="surrogatepass")

    return _Form("str", write, read)


def _enum_form(enum: type[StrEnum]) -> _Form:
    members = list(enum)
    places = {member: place for place, member in enumerate(members)}

    def write(out: bytearray, member: StrEnum) -> None:
        try:
            out += _COUNT.pack(places[member])
        except KeyError:
            raise ValueError(f"{member!r} is no {enum.__name__}") from None

    def read(reader: _Reader) -> StrEnum:
        place = reader.count()
        if place >= len(members):
            raise ValueError(f"{enum.__name__} has {len(members)} members, and the bytes name number {place}")
        return members[place]

    return _Form(f"{enum.__name__}({', '.join(members)})", write, read)


def _optional_form(hint: Any) -> _Form:
    present, value = _form(bool), _form(hint)

    def write(out: bytearray, content: Any) -> None:
        present.write(out, content is not None)
        if content is not None:
            value.write(out, content)

    def read(reader: _Reader) -> Any:
        return value.read(reader) if present.read(reader) else None

    return _Form(f"{value.layout}?", write, read)


@cache
def _record_form(record_type: type) -> _Form:
    hints = get_type_hints(record_type)
    forms = [(field.name, _form(hints[field.name])) for field in fields(record_type)]

    def write(out: bytearray, record: Any) -> None:
        for name, form in forms:
            form.write(out, getattr(record, name))

    def read(reader: _Reader) -> Any:
        return record_type(**{name: form.read(reader) for name, form in forms})

    inside = ", ".join(f"{name}: {form.layout}" for name, form in forms)
    return _Form(f"{record_type.__name__}({inside})", write, read)

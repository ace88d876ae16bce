"""Defines what all sections of the configuration have in common, and explains mistakes in them."""

import difflib
import os.path
import reprlib
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationInfo, field_validator

LARGEST_INTEGER = 2**31 - 1
"""The largest integer that an option may have: counts fit in 32 bits, here and in Megatron-Core."""
LARGEST_FLOAT, SMALLEST_FLOAT = 3.4e38, 1.2e-38
"""Bounds of an option's magnitude. Beyond them float32, in which the trainer computes, has infinity and zero."""
_LONGEST_PATH, _LONGEST_NAME = 4095, 255
"""Bytes that Linux allows in a path and in the name of a file."""


def user_path(text: str) -> str:
    """Returns `text` with `~` as the home folder. Raises ValueError for what no file can be called."""
    if not text.strip():
        raise ValueError("expected a path, got an empty text")
    if "\0" in text:
        raise ValueError("a path cannot hold a NUL byte; remove it")
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        raise ValueError("a path cannot hold half a character (a lone surrogate); write it anew") from None
    path = os.path.expanduser(text)
    if text.startswith("~") and path == text:
        raise ValueError("there is no such home folder; write the path out")
    size = len(os.fsencode(path))
    if size > _LONGEST_PATH:
        raise ValueError(f"a path may have {_LONGEST_PATH} bytes, this one has {size}; choose a shorter one")
    longest = max(len(os.fsencode(part)) for part in path.split("/"))
    if longest > _LONGEST_NAME:
        raise ValueError(f"a file's name may have {_LONGEST_NAME} bytes, one has {longest}; choose a shorter one")
    return path


UserPath = Annotated[str, AfterValidator(user_path)]
"""A file or folder that the user names. `~` becomes the home folder."""


_NUMBERS: tuple[object, ...] = (int, float, int | None, float | None)
"""Types of options that are numbers."""


class Section(BaseModel):
    """Options that belong together. A section is frozen, knows all its options, and has no infinite or huge numbers."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True, protected_namespaces=()
    )

    @field_validator("*", mode="before")
    @classmethod
    def refuse_booleans_as_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuses booleans as numbers, since `lr: yes` would be a learning rate of 1."""
        field = cls.model_fields.get(info.field_name or "")
        if isinstance(value, bool) and field is not None and field.annotation in _NUMBERS:
            raise ValueError("expected a number")
        return value

    @field_validator("*", mode="after")
    @classmethod
    def refuse_numbers_out_of_range(cls, value: Any) -> Any:
        if isinstance(value, int) and abs(value) > LARGEST_INTEGER:
            raise ValueError(f"expected a number of at most {LARGEST_INTEGER}")
        if isinstance(value, float) and value and not SMALLEST_FLOAT <= abs(value) <= LARGEST_FLOAT:
            raise ValueError(f"float32 has numbers from {SMALLEST_FLOAT} to {LARGEST_FLOAT}; give 0 or one of those")
        return value


NOT_OFFERED = {
    f"rollout.{name}": f"rollout.{name}: not offered: it samples from a part of the distribution, the trainer's "
    "probabilities are of the whole, so every ratio would be wrong; use rollout.temperature"
    for name in ("top_p", "top_k", "min_p")
}
"""Options that users of other trainers look for, with the reason why each is not offered."""

_SHORT = reprlib.Repr()
"""Shortens values: aliases let ten lines of YAML stand for a billion, which no error message must spell out."""
_SHORT.maxstring = _SHORT.maxother = 200
_SHORT.maxlevel = 2


def explain(error: Mapping[str, Any], root: type[Section], options: Sequence[str]) -> str:
    """Says in one line what is wrong: `error` is one that pydantic found in `root`, `options` are all dotted names."""
    location = tuple(str(part) for part in error["loc"])
    name = ".".join(location) or "configuration"
    name = _SHORT.repr(name)[1:-1] if len(name) > _SHORT.maxstring else name
    if error["type"] == "extra_forbidden":
        return NOT_OFFERED.get(name) or f"unknown option {name}{_nearest(location, root, options)}"
    if error["type"] == "missing":
        return f"{name}: missing; it has no default"
    message = error["msg"].removeprefix("Value error, ")
    if not location:
        return message
    if error["type"] == "model_type":
        message = "expected a section with options"
    if error["type"] == "tuple_type":
        message = "expected a list such as [a, b]"
    return f"{name}: {_SHORT.repr(error['input'])}: {message}"


def _nearest(location: tuple[str, ...], root: type[Section], options: Sequence[str]) -> str:
    section: Any = root
    for part in location[:-1]:
        section = section.model_fields[part].annotation
    here = list(section.model_fields)
    everywhere = {path.rsplit(".", 1)[-1]: path for path in options}
    if location[-1] in everywhere:
        return f"; did you mean {everywhere[location[-1]]}?"
    siblings = {name: ".".join((*location[:-1], name)) for name in here}
    for candidates, cutoff in ((siblings, 0.6), (everywhere, 0.6), (siblings, 0.4)):
        if near := difflib.get_close_matches(location[-1], candidates, n=1, cutoff=cutoff):
            return f"; did you mean {candidates[near[0]]}?"
    return f"; {'.'.join(location[:-1]) or 'the file'} has: {', '.join(here)}"

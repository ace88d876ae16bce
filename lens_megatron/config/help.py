"""Makes the text about the options from their classes: name, type with bounds, default and meaning."""

import difflib
import json
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from inspect import cleandoc
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import AfterValidator
from pydantic.fields import FieldInfo

from lens_megatron.config.options import Config
from lens_megatron.config.section import Section, user_path

_WIDTH = 110
_BOUNDS = {"gt": "above", "ge": "from", "lt": "below", "le": "to"}
"""The attributes of annotated_types' bounds, and how each is worded before its number."""
_NAMES: dict[Any, str] = {bool: "true or false", int: "whole number", float: "number", str: "text", dict: "mapping"}


@dataclass(frozen=True, slots=True)
class OptionHelp:
    """Describes one option.

    Example: OptionHelp("lens.tau", "number from 0 to 1", "0.5", "A prompt with a success rate strictly below ...").
    """

    name: str
    type: str
    default: str
    """The default as written in YAML; `required` where there is none."""
    meaning: str


@dataclass(frozen=True, slots=True)
class SectionHelp:
    """Describes one section of the configuration and its options, in the order in which they are declared."""

    name: str
    meaning: str
    options: tuple[OptionHelp, ...]


def sections() -> Iterator[SectionHelp]:
    """Returns every section of the configuration, whole."""
    for name, field in Config.model_fields.items():
        section = field.annotation
        assert isinstance(section, type) and issubclass(section, Section)
        options = tuple(describe(f"{name}.{key}", option) for key, option in section.model_fields.items())
        yield SectionHelp(name, cleandoc(section.__dict__.get("__doc__") or ""), options)


def find(word: str) -> list[SectionHelp]:
    """Returns the section `word`, or the options whose name or meaning contains it; all sections for an empty word.

    Upper and lower case are not told apart. Sections without such an option are left out.
    """
    everything, sought = list(sections()), word.lower()
    if named := [section for section in everything if section.name == sought]:
        return named
    found = []
    for section in everything:
        matching = tuple(o for o in section.options if sought in o.name.lower() or sought in o.meaning.lower())
        if matching:
            found.append(SectionHelp(section.name, section.meaning, matching))
    return found


def nearest(word: str) -> str:
    """Returns the section or option whose name is most like `word`; empty if none is."""
    names = {section.name: section.name for section in sections()}
    names |= {option.name.rpartition(".")[2]: option.name for section in sections() for option in section.options}
    near = difflib.get_close_matches(word.rpartition(".")[2].lower(), names, n=1)
    return names[near[0]] if near else ""


def render(found: Sequence[SectionHelp]) -> str:
    """Returns text for a terminal, at most 110 columns wide."""
    return "\n\n".join("\n".join(_section_lines(section)) for section in found)


def _section_lines(section: SectionHelp) -> Iterator[str]:
    yield f"{section.name}:"
    yield from _wrapped(section.meaning, 2)
    for option in section.options:
        facts = f"  {option.name}  ({option.type}; {_default_text(option.default)})"
        yield from textwrap.wrap(facts, _WIDTH, subsequent_indent=" " * 8)
        yield from _wrapped(option.meaning, 6)


def _default_text(default: str) -> str:
    return "required" if default == "required" else f"default {default}"


def _wrapped(text: str, indent: int) -> list[str]:
    space = " " * indent
    return textwrap.wrap(" ".join(text.split()), _WIDTH, initial_indent=space, subsequent_indent=space)


def describe(name: str, field: FieldInfo) -> OptionHelp:
    """Describes the option `name`, which `field` declares."""
    default = "required" if field.is_required() else _as_yaml(field.get_default(call_default_factory=False))
    return OptionHelp(name, _type_text(field.annotation, field.metadata), default, field.description or "")


def _as_yaml(value: object) -> str:
    if value is None:
        return "empty"
    return value if isinstance(value, str) and value.isidentifier() else json.dumps(value, ensure_ascii=False)


def _type_text(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """Returns the type in a user's words. Bounds and validators that pydantic keeps apart from it are in `metadata`."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type_text(arguments[0], arguments[1:])
    if origin is Literal:
        return " | ".join(map(str, arguments))
    if origin in (Union, UnionType):
        words = [_type_text(argument, metadata) for argument in arguments if argument is not NoneType]
        return " or ".join(words + ["empty"] * (NoneType in arguments))
    if origin is tuple:
        return f"list of {_type_text(arguments[0])}"
    if any(isinstance(item, AfterValidator) and item.func is user_path for item in metadata):
        return "path"
    return " ".join([_NAMES.get(origin or annotation, str(annotation)), *_bounds(metadata)])


def _bounds(metadata: Sequence[Any]) -> Iterator[str]:
    for attribute, wording in _BOUNDS.items():
        for item in metadata:
            if (bound := getattr(item, attribute, None)) is not None:
                yield f"{wording} {bound:,}" if isinstance(bound, int) else f"{wording} {bound:g}"

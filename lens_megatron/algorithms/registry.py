"""Finds methods by their names: a file of a kind's package, or `module:attribute` of the user's own.

    lens_megatron/algorithms/KIND/NAME.py   exports ENTRY = Entry(call, paper=..., options=..., needs=...)

A file whose name begins with an underscore is no method.
"""

import difflib
import importlib
import pkgutil
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lens_megatron.algorithms.entry import AnyEntry, Entry, Method
from lens_megatron.config import ConfigError, Section
from lens_megatron.config.section import explain


class Kind(StrEnum):
    """The kinds of methods. A kind's value is the name of its package."""

    SELECTION = "selection"
    PURIFICATION = "purification"
    REWARDS = "rewards"
    ADVANTAGES = "advantages"
    OBJECTIVES = "objectives"


def names(kind: Kind) -> list[str]:
    """Returns the names of all methods of a kind that ship with the project, sorted. Imports none of them."""
    folder = Path(__file__).parent / kind
    return sorted(module.name for module in pkgutil.iter_modules([str(folder)]) if not module.name.startswith("_"))


def find(kind: Kind, name: str, option: str) -> AnyEntry:
    """Returns the method `name`. Raises ConfigError, which names `option`, where there is none or it cannot be used."""
    if name.isidentifier() and name in names(kind):
        return importlib.import_module(f"{__package__}.{kind}.{name}").ENTRY
    module, separator, attribute = name.partition(":")
    if not (separator and module and attribute):
        near = difflib.get_close_matches(name, names(kind), n=1)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(names(kind))}"
        raise ConfigError(f"{option}: unknown method {name!r}; {hint} (your own: module:attribute)")
    try:
        entry = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # the module is the user's, and may raise anything
        raise ConfigError(
            f"{option}: {name} cannot be loaded: {type(error).__name__}: {error}; is its folder in PYTHONPATH?"
        ) from error
    if not isinstance(entry, Entry):
        raise ConfigError(f"{option}: {name} is a {type(entry).__name__}; expected an Entry (algorithms/entry.py)")
    return entry


def choose(kind: Kind, name: str, options: Mapping[str, Any], option: str, options_name: str) -> Method[Any]:
    """Returns the method `name` with its options, checked.

    Args:
        option, options_name: what the configuration calls the name and the options, for messages.

    Raises:
        ConfigError: there is no such method, or it has no such options.
    """
    entry = find(kind, name, option)
    try:
        checked = entry.options.model_validate(dict(options))
    except ValidationError as error:
        mistakes = [_explain(mistake, entry.options, options_name) for mistake in error.errors()]
        has = ", ".join(entry.options.model_fields) or "none"
        raise ConfigError("\n".join([*mistakes, f"the options of {name} are: {has}"])) from None
    return Method(name, entry.call, checked, entry.needs)


def _explain(mistake: Mapping[str, Any], section: type[Section], options_name: str) -> str:
    """Says in one line what is wrong with one of a method's own options."""
    if mistake["type"] != "extra_forbidden":
        return f"{options_name}.{explain(mistake, section, list(section.model_fields))}"
    name = str(mistake["loc"][0])
    near = difflib.get_close_matches(name, section.model_fields, n=1)
    return f"unknown option {options_name}.{name}" + (f"; did you mean {near[0]}?" if near else "")

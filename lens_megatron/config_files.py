"""YAML files -> one tree of sections and options: `base:` files first, then the file itself, then overrides.

# configs/mine.yaml
base: [base/paper.yaml, base/a800.yaml]     # relative to this file; a later one wins over an earlier one
model: {path: models/Qwen2.5-7B}            # mappings merge, everything else replaces
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml


class ConfigError(ValueError):
    """A mistake in the user's configuration; the message names the option, the value and the remedy."""


def read_tree(path: Path, inside: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The tree of `path` over those of its `base` files, which may have bases of their own.

    Args:
        inside: the files that led here, outermost first.

    Raises:
        ConfigError: missing file, bad YAML, not a mapping, `base` that is no file name, files that name each other.
    """
    if path.resolve() in [p.resolve() for p in inside]:
        chain = " -> ".join(map(str, (*inside, path)))
        raise ConfigError(f"{path}: base: the files name each other in a circle: {chain}; remove one of them")
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        where = f"{inside[-1]}: base: " if inside else ""
        raise ConfigError(f"{where}no configuration file at {path}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    tree = parse_yaml(text, f"{path}: cannot be read as YAML")
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected sections such as `model:` and `data:`, got {type(tree).__name__}")
    bases = tree.pop("base", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not (isinstance(bases, list) and all(isinstance(base, str) and base for base in bases)):
        raise ConfigError(f"{path}: base: expected a file name or a list of file names relative to this file")
    merged: dict[str, Any] = {}
    for base in bases:
        merged = merge(merged, read_tree(path.parent / base, (*inside, path)))
    return merge(merged, tree)


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """`above` over `below`, mapping by mapping. A section left empty (`lens:` with all options commented out) is none.

    Example: merge({"a": {"b": 1, "c": 2}}, {"a": {"b": 3}}) == {"a": {"b": 3, "c": 2}}.
    """
    result = dict(below)
    for key, value in above.items():
        old = result.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping):
            result[key] = merge(old, value)
        elif not (isinstance(old, Mapping) and value is None):
            result[key] = value
    return result


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Sets `section.option=value` in `tree`; the value is YAML. Raises ConfigError."""
    name, separator, text = override.partition("=")
    *sections, option = (part.strip() for part in name.split("."))
    if not separator or not option or not all(sections):
        raise ConfigError(f"override {override!r}: expected section.option=value")
    value = parse_yaml(text, f"override {override!r}: the value is not YAML")
    node = tree
    for section in sections:
        child = {} if node.get(section) is None else node[section]
        if not isinstance(child, dict):
            raise ConfigError(f"override {override!r}: {section!r} is an option, not a section")
        node[section] = dict(child)  # a copy: YAML aliases make one mapping stand in several places
        node = node[section]
    node[option] = value


def parse_yaml(text: str, mistake: str) -> Any:
    """PyYAML lets errors of its scalar types through: `2024-99-99` is a ValueError, `!!bool x` a KeyError."""
    try:
        return yaml.safe_load(text)
    except RecursionError:
        raise ConfigError(f"{mistake}: nested too deeply") from None
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, ArithmeticError) as error:
        raise ConfigError(f"{mistake}: {error}") from error


_MISSING = object()


def differing_keys(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Dotted names of options whose values differ, sorted. Missing on one side counts as different."""
    names = []
    for key in sorted(set(old) | set(new)):
        a, b, name = old.get(key, _MISSING), new.get(key, _MISSING), f"{prefix}{key}"
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            names += differing_keys(a, b, f"{name}.")
        elif a != b:
            names.append(name)
    return names

"""Reads YAML files into one tree of sections and options: `base:` files first, then the file itself, then overrides.

# configs/mine.yaml
base: [base/paper.yaml, base/a800.yaml]     # relative to this file; a later one wins over an earlier one
model: {path: models/Qwen2.5-7B}            # mappings merge, everything else replaces
reward: {rules: {}}                         # but an empty mapping, written so, empties the one below it

Several files are one tree, too: a later one wins over an earlier one.
"""

import os.path
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from lens_megatron.errors import UserError
from lens_megatron.files import read_regular

LARGEST_FILE = 1 << 18
"""The most bytes of a YAML file. Its parser takes seconds for more."""
LARGEST_TREE = 20_000
"""The most values of a tree. Each alias counts as what it stands for."""
LARGEST_DEPTH = 100
"""The most levels of a tree below each other."""


class ConfigError(UserError):
    """A mistake in the user's configuration; the message names the option, the value and the remedy."""


def read_tree(*paths: Path) -> dict[str, Any]:
    """Reads `paths`, each over the files that it names as `base`, which may have bases of their own.

    Raises:
        ConfigError: a file is missing or no YAML mapping, `base` is no file name, or files name each other.
    """
    tree: dict[str, Any] = {}
    for path in paths:
        for layer in _layers(path, (), {}).values():
            tree = merge(tree, layer)
    return tree


Layers = dict[str, dict[str, Any]]
"""The trees of files by the files' absolute paths, lowest first. A file that is named twice stands at its last place:
what stood at an earlier one would be set again there."""


def _layers(path: Path, inside: tuple[Path, ...], done: dict[str, Layers]) -> Layers:
    """Reads `path`, named by the files `inside`, outermost first. `done` holds what was read so far, each file once."""
    place = os.path.abspath(path)  # not the resolved path: resolving fails where links go in a circle
    if place in map(os.path.abspath, inside):
        chain = " -> ".join(map(str, (*inside, path)))
        raise ConfigError(f"{path}: base: the files name each other in a circle: {chain}; remove one of them")
    if len(inside) > LARGEST_DEPTH:
        raise ConfigError(f"{inside[0]}: base: more than {LARGEST_DEPTH} files below each other; put some into one")
    if place not in done:
        tree = _read_one(path, inside)
        bases = tree.pop("base", [])
        bases = [bases] if isinstance(bases, str) else bases
        if not (isinstance(bases, list) and all(isinstance(base, str) and base for base in bases)):
            raise ConfigError(f"{path}: base: expected a file name or a list of file names relative to this file")
        layers: Layers = {}
        for base in bases:
            for name, layer in _layers(path.parent / base, (*inside, path), done).items():
                layers.pop(name, None)
                layers[name] = layer
        done[place] = layers | {place: tree}
    return done[place]


def _read_one(path: Path, inside: tuple[Path, ...]) -> dict[str, Any]:
    try:
        text = read_regular(path, LARGEST_FILE).decode("utf-8")
    except FileNotFoundError as error:
        where = f"{inside[-1]}: base: " if inside else ""
        raise ConfigError(f"{where}no configuration file at {path}{_remedy(path)}") from error
    except OSError as error:
        remedy = _remedy(path) or "; give a YAML file"
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}{remedy}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: cannot be read: {error}; save it as UTF-8") from error
    tree = parse_yaml(text, f"{path}: cannot be read as YAML")
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected sections such as `model:` and `data:`, got {type(tree).__name__}")
    return tree


def _remedy(path: Path) -> str:
    """Returns what to do about a word among the files that is none, and does not look like one either."""
    looks = path.suffix.lower() in (".yaml", ".yml")
    return "" if looks else "; give a .yaml file, or an override: expected section.option=value"


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Merges `above` over `below`, by mapping. An empty section (`lens:`, all options commented out) changes nothing;
    an empty mapping (`lens: {}`) empties the section, so that all its options have their defaults.

    Example: merge({"a": {"b": 1, "c": 2}}, {"a": {"b": 3}}) == {"a": {"b": 3, "c": 2}}.
    """
    result = dict(below)
    for key, value in above.items():
        old = result.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping) and value:
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
        node[section] = dict(child)  # a copy is made because YAML aliases put one mapping in several places
        node = node[section]
    node[option] = value


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice in a mapping: PyYAML takes the last one and says nothing."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        counts = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<")
        for key, count in counts.most_common(1):
            if count > 1:
                why = f"{key[:80]!r} stands {count} times in one section; keep one"
                raise yaml.constructor.ConstructorError(None, None, why, node.start_mark)
        return super().construct_mapping(node, deep)


def parse_yaml(text: str, mistake: str) -> Any:
    """Reads YAML into plain values. Raises ConfigError, which begins with `mistake`.

    PyYAML lets errors of its scalar types through: `2024-99-99` is a ValueError, `!!bool x` a KeyError.
    """
    try:
        tree = yaml.load(text, _Loader)
    except RecursionError:
        raise ConfigError(f"{mistake}: nested too deeply") from None
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, ArithmeticError) as error:
        raise ConfigError(f"{mistake}: {error}") from error
    if why := _too_large(tree):
        raise ConfigError(f"{mistake}: {why}")
    return tree


def _too_large(tree: Any) -> str:
    """Returns why the tree is too large to be used; empty if it is not. With aliases ten lines can be endless."""
    level, values = [tree], 0
    for _ in range(LARGEST_DEPTH):
        values += len(level)
        inner = [node.values() if isinstance(node, dict) else node for node in level if isinstance(node, dict | list)]
        if values + sum(map(len, inner)) > LARGEST_TREE:
            return f"it stands for more than {LARGEST_TREE:,} values; write fewer, or fewer aliases"
        level = [value for node in inner for value in node]
        if not level:
            return ""
    return f"more than {LARGEST_DEPTH} levels below each other, or an alias that names itself; write plain values"


_MISSING = object()


def differing_keys(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Returns dotted names of options whose values differ, sorted. One that a side lacks counts as different."""
    names = []
    for key in sorted(set(old) | set(new)):
        a, b, name = old.get(key, _MISSING), new.get(key, _MISSING), f"{prefix}{key}"
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            names += differing_keys(a, b, f"{name}.")
        elif a != b:
            names.append(name)
    return names

"""Puts a method's options in the place of those that the method of a run has set.

The files of configs/methods say between them which options make a method. A run's config.yaml has the values of all
options but not who set them, so every option of SECTIONS that any of these files sets is taken out of it, and then the
file of the arm's method is laid over the rest. What no file of a method sets (`lens.deletion_ratio`, graders, data,
optimizer) stays as the run has it, and so does what a method's file sets in another section
(`rollout.rollouts_per_prompt` of grpo_extended), since there is no other value to put in its place.
"""

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lens_megatron.algorithms import listing
from lens_megatron.config.files import merge, read_tree
from lens_megatron.tools.compare.request import CompareError

SECTIONS = ("selection", "reward", "lens", "algorithm")
"""The sections whose options make a method: those of config/method_options.py."""
OWN = "own"
"""Names the run's own options, whatever set them."""


@dataclass(frozen=True, slots=True)
class ComparedMethod:
    """A method of a comparison. Example: ComparedMethod("grpo+reward_flips", (grpo.yaml, reward_flips.yaml))."""

    name: str
    """Names the folder of its arms, and its row in tables."""
    files: tuple[Path, ...]
    """A later one wins over an earlier one; empty for the run's own options."""


def find_methods(text: str) -> tuple[ComparedMethod, ...]:
    """Reads names of configs/methods, paths of YAML files and `own`, with commas between; `+` joins several files.

    Raises CompareError for an unknown or repeated name.
    """
    names = [name.strip() for name in text.split(",")]
    methods = tuple(_find(name) for name in names)
    seen: dict[str, str] = {}
    for method, asked in zip(methods, names, strict=True):
        if method.name in seen:
            raise CompareError(
                f"--methods: {seen[method.name]} and {asked} would both be called {method.name}; name each method "
                "once, or rename a file"
            )
        seen[method.name] = asked
    return methods


def _find(name: str) -> ComparedMethod:
    if name == OWN:
        return ComparedMethod(OWN, ())
    files = tuple(_file(part.strip()) for part in name.split("+"))
    return ComparedMethod("+".join(path.stem for path in files), files)


def _file(name: str) -> Path:
    if name.endswith((".yaml", ".yml")):
        if not Path(name).is_file():
            raise CompareError(
                f"--methods: there is no file {name}; give the path of a YAML file with a method's options"
            )
        return Path(name)
    known = sorted(file.name for file in listing.files())
    if name in known:
        return listing.FILES / f"{name}.yaml"
    near = difflib.get_close_matches(name, [*known, OWN], n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(known) or 'none'}, and {OWN}"
    raise CompareError(f"--methods: there is no method {name!r}; {hint} The path of a YAML file names a method, too.")


def options_of_methods() -> frozenset[str]:
    """Returns the dotted names of the options of SECTIONS that a file of configs/methods sets."""
    trees = (read_tree(listing.FILES / f"{file.name}.yaml") for file in listing.files())
    return frozenset(name for tree in trees for name in _names(tree))


def _names(tree: Mapping[str, Any]) -> Iterator[str]:
    for section in SECTIONS:
        yield from (f"{section}.{option}" for option in tree.get(section) or ())


def with_method(options: Mapping[str, Any], method: ComparedMethod) -> dict[str, Any]:
    """Returns the options of a run, as nested mappings, with the method's in the place of those of its own method.

    Raises ConfigError where a file of the method cannot be read.
    """
    if not method.files:
        return dict(options)
    replaced = options_of_methods()
    kept = {
        section: {name: value for name, value in values.items() if f"{section}.{name}" not in replaced}
        if isinstance(values, Mapping)
        else values
        for section, values in options.items()
    }
    return merge(kept, read_tree(*method.files))

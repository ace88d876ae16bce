"""Makes a validated, frozen `Config` of YAML files and dotted overrides."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lens_megatron.config import rules
from lens_megatron.config.files import ConfigError, apply_override, read_tree
from lens_megatron.config.options import Config
from lens_megatron.config.section import Section, explain


def load(paths: str | Path | Sequence[str | Path], overrides: Sequence[str] = ()) -> Config:
    """Reads YAML files, each over those that it names as `base`, applies `a.b=value` overrides and validates.

    Args:
        paths: one file, or several, of which a later one wins over an earlier one.

    Raises:
        ConfigError: missing file, bad YAML, unknown option (with the nearest valid one), wrong type or bound, options
            that do not go together.
    """
    several = [paths] if isinstance(paths, str | Path) else paths
    tree = read_tree(*map(Path, several))
    for override in overrides:
        apply_override(tree, override)
    return from_tree(tree)


def from_tree(tree: Mapping[str, Any]) -> Config:
    """Validates nested mappings, as YAML gives them. Raises ConfigError listing every mistake, one per line."""
    if isinstance(tree, Mapping):  # a section whose options are all commented out
        tree = {name: section for name, section in tree.items() if section is not None}
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("\n".join(explain(e, Config, all_options()) for e in error.errors())) from None
    for mistake in rules.mistakes(config):
        raise ConfigError(mistake)
    try:
        config.model_dump_json()
    except (ValueError, RecursionError) as error:  # YAML can say things that no file of the run could hold
        raise ConfigError(f"configuration: a value cannot be saved: {error}; write plain values") from None
    return config


def sections() -> dict[str, type[Section]]:
    """Returns the class of every section by its name, in the order of `Config`."""
    found = {name: field.annotation for name, field in Config.model_fields.items()}
    return {name: kind for name, kind in found.items() if isinstance(kind, type) and issubclass(kind, Section)}


def all_options() -> list[str]:
    """Returns dotted names of every option."""
    return [f"{name}.{option}" for name, section in sections().items() for option in section.model_fields]

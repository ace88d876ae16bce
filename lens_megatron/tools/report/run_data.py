"""Reads the metrics and the options of a run from its folder."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lens_megatron.config.files import ConfigError, read_tree
from lens_megatron.errors import UserError
from lens_megatron.output.metrics import read_metrics

Row = Mapping[str, float]
"""The metrics of a step by their names in metrics.jsonl. `step` is one of them."""
PLACES_OF_A_RUN = ("run", "debug", "cluster")
"""Sections of the options that may differ between the seeds of one configuration."""


class ReportError(UserError):
    """A report cannot be made of what the user named; the message says what to name instead."""


@dataclass(frozen=True, slots=True)
class RunData:
    """What a run left, without its rollouts."""

    folder: Path
    name: str
    """The name of the run in the report; no two runs have the same."""
    rows: tuple[Row, ...]
    """One row per step, ascending, with finite numbers only."""
    options: Mapping[str, str]
    """Every option by its dotted name, as text; empty where config.yaml cannot be read."""
    notes: tuple[str, ...]
    """Sentences on what could not be read."""

    @property
    def settings(self) -> tuple[tuple[str, str], ...]:
        """The options that make two runs runs of one configuration, sorted."""
        return tuple(sorted(item for item in self.options.items() if item[0].split(".")[0] not in PLACES_OF_A_RUN))


def read_runs(folders: tuple[Path, ...]) -> tuple[RunData, ...]:
    """Reads the runs in `folders`, each once. Raises ReportError where one of them holds no metrics."""
    once = tuple({folder.absolute(): folder for folder in folders}.values())
    return tuple(_read_run(folder, name) for folder, name in zip(once, _names(once), strict=True))


def _names(folders: tuple[Path, ...]) -> list[str]:
    """Returns the last part of every path, or as many parts as it takes to tell them apart."""
    parts = [folder.absolute().parts for folder in folders]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(path[-depth:]) for path in parts]
        if len(set(names)) == len(names):
            break
    return names


def _read_run(folder: Path, name: str) -> RunData:
    path = folder / "metrics.jsonl"
    if not folder.is_dir():
        raise ReportError(f"{folder} is no folder; give the folder of a run (its run.directory)")
    if not path.is_file():
        raise ReportError(f"{folder} has no metrics.jsonl; give the folder of a run (its run.directory)")
    try:
        rows = tuple(_finite(row) for row in sorted(read_metrics(folder), key=lambda row: row["step"]))
        broken = _broken_lines(path)
    except OSError as error:
        raise ReportError(f"{path} cannot be read: {error.strerror or error}; make it readable") from error
    if not rows:
        raise ReportError(f"{path} holds no step yet ({broken} broken lines); wait for the first, or name another run")
    notes = [f"{broken} lines of {name}/metrics.jsonl are broken and were left out."] if broken else []
    options: dict[str, str] = {}
    try:
        options = _flat(read_tree(folder / "config.yaml"))
    except ConfigError as error:
        notes.append(f"The options of {name} are not known, so it is taken for a configuration of its own: {error}")
    return RunData(folder, name, rows, options, tuple(notes))


def _broken_lines(path: Path) -> int:
    """Counts lines that are no row. The last one may be half written while the run goes on, and is not counted."""
    lines = path.read_bytes().split(b"\n")[:-1]
    return sum(not _is_row(line) for line in lines if line.strip())


def _is_row(line: bytes) -> bool:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(row, dict) and type(row.get("step")) is int


def _finite(row: Mapping[str, Any]) -> dict[str, float]:
    """Returns the finite numbers of a row: a diverged step has NaN, which JSON in a page cannot hold."""
    numbers = {name: value for name, value in row.items() if type(value) in (int, float)}
    return {name: value for name, value in numbers.items() if math.isfinite(value)}


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Returns the leaves of a tree of options by dotted names: {"a": {"b": 1}} becomes {"a.b": "1"}."""
    flat: dict[str, str] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = json.dumps(value, default=str, ensure_ascii=False)
    return flat

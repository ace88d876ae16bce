"""Puts a report into one HTML file, which needs nothing beside itself: charts, their library, and the groups."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path

import altair
import vl_convert
from jinja2 import Environment, StrictUndefined

import lens_megatron
from lens_megatron.config.files import differing_keys
from lens_megatron.tools.report import browser
from lens_megatron.tools.report.digest import RolloutReader
from lens_megatron.tools.report.run_data import RunData, read_runs
from lens_megatron.tools.report.sections import ReportInput, sections
from lens_megatron.tools.report.seeds import Configuration, accuracy, configurations

MOST_DIFFERENCES = 60
"""Options that the table of differences shows, at most."""


@dataclass(frozen=True, slots=True)
class RunLine:
    """A run in the table at the head of the page."""

    name: str
    configuration: str
    seed: str
    steps: int
    first: float | None
    """Accuracies are shares; None where none was measured."""
    last: float | None
    best: float | None
    best_step: int | None
    seconds: float | None
    """The mean seconds of a step."""


@dataclass(frozen=True, slots=True)
class OptionDifference:
    """An option that has not the same value in all configurations."""

    option: str
    values: tuple[str, ...]
    """One per configuration."""


def make(folders: tuple[Path, ...], reader: RolloutReader, reload_seconds: int = 0) -> str:
    """Returns the HTML page of the runs in `folders`.

    Args:
        reload_seconds: the page loads itself again after so many seconds; 0: never.

    Raises:
        ReportError: a folder holds no run with at least one step.
    """
    runs = read_runs(folders)
    found = configurations(runs)
    evidence = ReportInput(found, {run.name: reader.read(run) for run in runs})
    groups = browser.choose(list(evidence.digests.values()))
    notes = [note for run in runs for note in (*run.notes, *evidence.digests[run.name].notes)]
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(_asset("page.html")).render(
        title=", ".join(configuration.name for configuration in found),
        version=lens_megatron.__version__,
        style=_asset("page.css"),
        script=_asset("page.js"),
        library=_library(),
        reload_seconds=reload_seconds,
        sections=sections(evidence),
        browser=groups,
        runs=[_line(run, configuration) for configuration in found for run in configuration.runs],
        configurations=[configuration.name for configuration in found],
        differences=_differences(found),
        notes=[*notes, *_without_rollouts(evidence), *_unequal(found)],
    )


def _asset(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


@cache
def _library() -> str:
    """Returns Vega, Vega-Lite and Vega-Embed as one script, for the version of Vega-Lite that altair writes."""
    version = ".".join(altair.SCHEMA_VERSION.removeprefix("v").split(".")[:2])
    known = vl_convert.get_vegalite_versions()
    chosen = version if version in known else known[-1]
    script = vl_convert.javascript_bundle(vl_version=chosen)  # type: ignore[call-arg]  # the stub lacks a default
    return str(script).replace("</script", "<\\/script")


def _line(run: RunData, configuration: Configuration) -> RunLine:
    curve = accuracy(run)
    steps = [row["timing_s/step"] for row in run.rows if "timing_s/step" in row]
    best_step = max(curve, key=lambda step: curve[step]) if curve else None
    return RunLine(
        name=run.name,
        configuration=configuration.name,
        seed=run.options.get("run.seed", ""),
        steps=int(run.rows[-1]["step"]),
        first=curve[min(curve)] if curve else None,
        last=curve[max(curve)] if curve else None,
        best=None if best_step is None else curve[best_step],
        best_step=best_step,
        seconds=statistics.fmean(steps) if steps else None,
    )


def _differences(found: Sequence[Configuration]) -> tuple[OptionDifference, ...]:
    """Returns the options in which configurations differ; none where fewer than two of them are known."""
    known = [dict(configuration.runs[0].settings) for configuration in found]
    if sum(map(bool, known)) < 2:
        return ()
    first = next(filter(None, known))
    names = sorted({name for other in known if other for name in differing_keys(first, other)})
    return tuple(
        OptionDifference(name, tuple(options.get(name, "-") for options in known)) for name in names[:MOST_DIFFERENCES]
    )


def _without_rollouts(evidence: ReportInput) -> list[str]:
    names = [name for name, digest in evidence.digests.items() if not digest.steps]
    what = "is nothing to read in the folder rollouts/ (run.save_rollout_files), so no groups can be shown of"
    return [f"There {what}: {', '.join(names)}."] if names else []


def _unequal(found: Sequence[Configuration]) -> list[str]:
    """Says where a mean over seeds ends early because one of the runs did."""
    notes = []
    for configuration in found:
        steps = {run.name: int(run.rows[-1]["step"]) for run in configuration.runs}
        if len(set(steps.values())) > 1:
            counts = ", ".join(f"{name}: {count}" for name, count in steps.items())
            notes.append(
                f"The runs of {configuration.name} have done different numbers of steps ({counts}); means over them "
                "show the steps that all of them have done."
            )
    return notes

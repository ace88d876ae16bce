"""Writes results as Markdown, in the order of the paper's columns, and as JSON; reads them back."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lens_megatron.evaluation.benchmarks import title_of
from lens_megatron.evaluation.journal import EvaluationFolderError, EvaluationIdentity
from lens_megatron.evaluation.statistics import LEVEL, Estimate
from lens_megatron.evaluation.summary import BenchmarkResult, EvaluationResult, PartResult, ProblemResult

RESULTS, TABLE = "results.json", "table.md"


def table(result: EvaluationResult, identity: EvaluationIdentity, notes: Sequence[str] = ()) -> str:
    """Returns a page: a line on what was evaluated, the table of benchmarks, then tables by subject and level."""
    head = [
        f"# {identity.model}",
        "",
        f"Protocol {identity.protocol}, hash `{identity.protocol_hash}`; engine {identity.engine}, {identity.dtype}; "
        f"seed {identity.seed}. Numbers are percent; [a, b] is the {LEVEL:.0%} interval over problems.",
        *(f"\n{note}" for note in notes),
        "",
    ]
    parts = [
        (benchmark, what, parts)
        for benchmark in result.benchmarks
        for what, parts in (("subject", benchmark.by_subject), ("level", benchmark.by_level))
        if parts
    ]
    details = [line for benchmark, what, own in parts for line in _part_table(benchmark, what, own)]
    return "\n".join([*head, *_main_table(result), *details]) + "\n"


def _main_table(result: EvaluationResult) -> list[str]:
    benchmarks = result.benchmarks
    rows: list[tuple[str, Callable[[BenchmarkResult], str], str]] = [
        ("problems", lambda b: str(len(b.problems)), ""),
        ("samples k", lambda b: str(b.samples), ""),
        ("avg@k", lambda b: _percent(b.accuracy.mean), _percent(result.average.mean) if result.average else ""),
        ("interval", lambda b: _interval(b.accuracy), _interval(result.average) if result.average else ""),
    ]
    if any(benchmark.samples > 1 for benchmark in benchmarks):
        rows.append(("pass@k", lambda b: _percent(b.pass_at[-1]), ""))
        rows.append(("maj@k", lambda b: _percent(b.majority_at[-1][1]) if b.majority_at else "", ""))
    if any(benchmark.borda is not None for benchmark in benchmarks):
        rows.append(("Borda@k", lambda b: "" if b.borda is None else _percent(b.borda), ""))
    rows += [
        ("truncated", lambda b: _percent(b.truncated), ""),
        ("unparsed", lambda b: _percent(b.unparsed), ""),
        ("grading failed", lambda b: _percent(b.timed_out), ""),
        ("mean tokens", lambda b: f"{b.mean_tokens:.0f}", ""),
    ]
    paper = [benchmark for benchmark in benchmarks if title_of(benchmark.name) != benchmark.name]
    others = [benchmark for benchmark in benchmarks if title_of(benchmark.name) == benchmark.name]
    titles = [*(title_of(b.name) for b in paper), *(["Average"] if paper else []), *(b.name for b in others)]
    lines = [_row(["", *titles]), _row(["---", *["---:"] * len(titles)])]
    for name, cell, mean in rows:
        lines.append(_row([name, *map(cell, paper), *([mean] if paper else []), *map(cell, others)]))
    return lines


def _part_table(benchmark: BenchmarkResult, what: str, parts: Sequence[PartResult]) -> list[str]:
    lines = ["", f"## {title_of(benchmark.name)} by {what}", ""]
    lines += [_row([what, "problems", "avg@k", "interval"]), _row(["---", "---:", "---:", "---:"])]
    return lines + [
        _row([part.name.replace("|", "/"), str(part.problems), _percent(part.accuracy.mean), _interval(part.accuracy)])
        for part in parts
    ]


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _interval(found: Estimate) -> str:
    return f"[{100 * found.low:.1f}, {100 * found.high:.1f}]"


def to_json(result: EvaluationResult, identity: EvaluationIdentity, versions: Mapping[str, str]) -> str:
    """Returns everything: the identity, the versions of what graded, and every result down to the problems."""
    settings = json.loads(identity.settings)
    content = {
        "identity": asdict(identity) | {"settings": settings, "digests": dict(identity.digests)},
        "versions": dict(versions),
        "average": None if result.average is None else asdict(result.average),
        "benchmarks": [asdict(benchmark) for benchmark in result.benchmarks],
    }
    return json.dumps(content, indent=1) + "\n"


def read_problem_results(folder: Path) -> dict[str, tuple[ProblemResult, ...]]:
    """Returns the results of every problem, by benchmark, of a folder that an evaluation has completed.

    Raises EvaluationFolderError where there are none, or they cannot be read.
    """
    path = folder / RESULTS
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {each["name"]: tuple(map(_problem, each["problems"])) for each in content["benchmarks"]}
    except FileNotFoundError:
        raise EvaluationFolderError(
            f"{folder}: no {RESULTS} there; give the folder of an evaluation that has ended, or end it by its command"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EvaluationFolderError(
            f"{path}: cannot be read: {type(error).__name__}: {error}; write it again by the command of the evaluation"
        ) from error


def _problem(content: Mapping[str, Any]) -> ProblemResult:
    return ProblemResult(**dict(content) | {"groups": tuple(content["groups"])})

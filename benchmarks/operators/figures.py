"""Draws a results file: time as a fraction of the roof, and peak memory, per peer and case.

python -m benchmarks.operators.figures benchmarks/results/operators_cuda_....json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.operators.peers import OURS
from benchmarks.operators.results import Status

COLOURS = {True: "tab:blue", False: "tab:grey"}  # ours or a peer


def draw(results: Path) -> list[Path]:
    """Draws one PNG per operator into the folder figures/ beside the results."""
    content = json.loads(results.read_text())
    folder = results.parent / "figures"
    folder.mkdir(exist_ok=True)
    measured = [case for case in content["cases"] if "roof_seconds" in case]
    paths = []
    for operator in dict.fromkeys(case["operator"] for case in measured):
        cases = [case for case in measured if case["operator"] == operator]
        path = folder / f"{results.stem}_{operator}.png"
        _draw_operator(operator, cases, content["environment"], path)
        paths.append(path)
    return paths


def _draw_operator(operator: str, cases: list[dict], environment: dict, path: Path) -> None:
    height = 1.2 + sum(0.6 + 0.3 * len(_rows(case)) for case in cases)
    figure, axes = plt.subplots(len(cases), 2, figsize=(12, height), squeeze=False, layout="constrained")
    for (left, right), case in zip(axes, cases, strict=True):
        rows = _rows(case)[::-1]  # barh draws upwards
        names = [row["peer"] for row in rows]
        colours = [COLOURS[row["peer"] == OURS] for row in rows]
        median = [row["seconds"]["median"] * 1e3 for row in rows]
        low, high = ([row["seconds"]["quartiles"][i] * 1e3 for row in rows] for i in (0, 1))
        error = [[m - x for m, x in zip(median, low, strict=True)], [x - m for m, x in zip(median, high, strict=True)]]
        left.barh(names, median, xerr=error, color=colours)
        left.axvline(case["roof_seconds"] * 1e3, color="black", linestyle="--", label="roof measured in this run")
        left.set(xlabel="ms, median and quartiles", title=_title(case))
        left.legend(fontsize="small")
        right.barh(names, [row["peak_extra_bytes"] / 2**20 for row in rows], color=colours)
        right.axvline(case["logits_bytes"] / 2**20, color="black", linestyle=":", label="the logits themselves")
        right.set(xlabel="peak extra memory, MiB", yticklabels=[])
        right.legend(fontsize="small")
    device, commit = environment["device"]["name"], (environment["commit"] or "unknown")[:10]
    figure.suptitle(f"{operator}: {device}, torch {environment['versions']['torch']}, commit {commit}")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _title(case: dict) -> str:
    """Returns the case's name, and the peers that have no bar though they could run on the device."""
    name = case["case"].removeprefix(f"{case['operator']}-")
    missing = [row["peer"] for row in case["rows"] if row["status"] not in (Status.MEASURED, Status.INAPPLICABLE)]
    return f"{name}\nnot timed: {', '.join(missing)}" if missing else name


def _rows(case: dict) -> list[dict]:
    return [row for row in case["rows"] if row["status"] == Status.MEASURED]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+")
    for results in parser.parse_args().results:
        for path in draw(results):
            print(path)


if __name__ == "__main__":
    main()

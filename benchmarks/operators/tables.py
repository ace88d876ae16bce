"""Prints the results that pytest-benchmark's own table leaves out: as text after a run, as Markdown from its file.

python -m benchmarks.operators.tables benchmarks/results/operators_cuda_....json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from benchmarks.operators.results import SCHEMA, Status

COLUMNS = (
    f"{'':38} {'ms':>9} {'quartiles':>19} {'host ms':>9} {'rate':>13} {'of roof':>8} {'peak MiB':>9} {'of logits':>9}"
)
HIDDEN_ROUNDS = 0.9
"""The share of rounds in which the sleep must have hidden the host, so that the median is free of waiting for it."""
MARKDOWN_COLUMNS = ("peer", "ms: median (quartiles)", "host ms", "of roof", "peak extra MiB", "of the logits", "note")


def verdict(case: dict) -> str:
    """Says in words how ours compares with the peers of a case.

    It speaks of the best peer, or of being ahead of every peer, only if every peer that can run on the device was timed
    in this case. Otherwise it names those that were not, and why.
    """
    comparison = case["comparison"]
    quickest, ratio, not_timed = (comparison[key] for key in ("quickest", "ratio", "not_timed"))
    if quickest is None:
        return " ".join(["Ours is compared with no peer.", *_missing(not_timed)])
    takes = f"{quickest}, takes {ratio:.2f} times the time of ours"
    if not_timed:
        return " ".join([f"Of the peers that were timed, the quickest, {takes}.", *_missing(not_timed)])
    if ratio > 1:
        return f"Ours is ahead of every peer: the best one, {takes}."
    return f"Ours is not ahead: the best peer, {takes}."


def _missing(not_timed: list[str]) -> list[str]:
    return [f"Not timed here, though they may be quicker: {'; '.join(not_timed)}."] if not_timed else []


def table(case: dict) -> str:
    """Returns a case's rows as text, and the verdict below them; without times if the case was not measured."""
    if "roof_seconds" not in case:
        return "\n".join([case["case"], *(_line(case, row) for row in case["rows"])])
    lines = [f"{case['case']}   (roof {case['roof_seconds'] * 1e3:.2f} ms)", COLUMNS]
    return "\n".join([*lines, *(_line(case, row) for row in case["rows"]), f"  {verdict(case)}"])


def _line(case: dict, row: dict) -> str:
    if row["status"] != Status.MEASURED:
        return f"  {row['peer']:36} {row['status']}: {row['reason']}"
    low, high = (x * 1e3 for x in row["seconds"]["quartiles"])
    unit, scale = ("TFLOP/s", 1e12) if case["unit"] == "FLOP/s" else ("GB/s", 1e9)
    peak = row["peak_extra_bytes"]
    return (
        f"  {row['peer']:36} {row['seconds']['median'] * 1e3:9.2f} {f'{low:.2f}..{high:.2f}':>19} {_host(row):>9} "
        f"{row['rate'] / scale:7.2f} {unit:>5} {row['roof_fraction']:8.1%} {peak / 2**20:9.1f} "
        f"{peak / case['logits_bytes']:9.1%}"
    )


def _host(row: dict) -> str:
    """Returns the host's milliseconds per call, with a star if the device waited for them in too many rounds."""
    if row["host_seconds"] is None:
        return "-"
    return f"{row['host_seconds']['median'] * 1e3:.2f}{'' if row['host_hidden'] >= HIDDEN_ROUNDS else '*'}"


def markdown(case: dict) -> str:
    """Returns a case as a Markdown section: a table of all peers, measured or not, and the verdict."""
    title = f"### {case['case']}"
    if "roof_seconds" not in case:
        return "\n".join([title, "", *(f"* {row['peer']}: {row['status']}: {row['reason']}" for row in case["rows"])])
    rule = "|".join(["", *("---" for _ in MARKDOWN_COLUMNS), ""])
    head = [title, "", _cells(MARKDOWN_COLUMNS), rule]
    return "\n".join([*head, *(_cells(_markdown_row(case, row)) for row in case["rows"]), "", verdict(case)])


def _markdown_row(case: dict, row: dict) -> tuple[str, ...]:
    if row["status"] != Status.MEASURED:
        return row["peer"], f"{row['status']}: {row['reason']}", *[""] * (len(MARKDOWN_COLUMNS) - 3), row["note"]
    low, high = (x * 1e3 for x in row["seconds"]["quartiles"])
    return (
        row["peer"],
        f"{row['seconds']['median'] * 1e3:.3g} ({low:.3g}-{high:.3g})",
        _host(row),
        f"{row['roof_fraction']:.0%}",
        f"{row['peak_extra_bytes'] / 2**20:.0f}",
        f"{row['peak_extra_bytes'] / case['logits_bytes']:.0%}",
        row["note"],
    )


def _cells(texts: tuple[str, ...]) -> str:
    return f"| {' | '.join(text.replace('|', '/') for text in texts)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    content = json.loads(parser.parse_args().results.read_text())
    if content["schema"] != SCHEMA:
        parser.error(f"the file has schema {content['schema']}, and this version reads {SCHEMA}: check out its commit")
    print("\n\n".join(markdown(case) for case in content["cases"]))


if __name__ == "__main__":
    main()

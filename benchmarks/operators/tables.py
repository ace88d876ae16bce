"""Prints the results that pytest-benchmark's own table leaves out, as text."""

from __future__ import annotations

from benchmarks.operators.campaign import MEASURED

COLUMNS = f"{'':36} {'ms':>9} {'quartiles':>19} {'rate':>13} {'of roof':>8} {'peak MiB':>9} {'of logits':>9}"


def table(case: dict) -> str:
    lines = [f"{case['case']}   (roof {case['roof_seconds'] * 1e3:.2f} ms)", COLUMNS]
    return "\n".join([*lines, *(_line(case, row) for row in case["rows"])])


def _line(case: dict, row: dict) -> str:
    if row["status"] != MEASURED:
        return f"  {row['peer']:34} {row['status']}: {row['reason']}"
    low, high = (x * 1e3 for x in row["seconds"]["quartiles"])
    unit, scale = ("TFLOP/s", 1e12) if case["unit"] == "FLOP/s" else ("GB/s", 1e9)
    peak = row["peak_extra_bytes"]
    return (
        f"  {row['peer']:34} {row['seconds']['median'] * 1e3:9.2f} {f'{low:.2f}..{high:.2f}':>19} "
        f"{row['rate'] / scale:7.2f} {unit:>5} {row['roof_fraction']:8.1%} {peak / 2**20:9.1f} "
        f"{peak / case['logits_bytes']:9.1%}"
    )

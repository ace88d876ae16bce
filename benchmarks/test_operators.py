"""Measures with `pytest benchmarks --benchmark-only` every operator of lens_kernels beside its peers; -k chooses some.

The peers of a case are measured together, in turn, when the first is asked for; the others only report. So the clock
that pytest-benchmark reads is one that replays those seconds.
"""

import pytest

from benchmarks.operators.peers import OURS
from benchmarks.operators.results import Status
from benchmarks.operators.timing import replay, replayed_time


@pytest.mark.filterwarnings("ignore:Benchmark fixture was not used")  # a peer that is skipped does not use it
@pytest.mark.benchmark(timer=replayed_time)
def test_operator(case, peer, campaign, benchmark):
    row = campaign.row(case, peer)
    if row["status"] != Status.MEASURED:
        reason = f"{row['status']}: {row['reason']}"
        if peer == OURS and row["status"] == Status.FAILED:
            pytest.fail(reason)
        pytest.skip(reason)
    benchmark.group = str(case)
    benchmark.extra_info |= {key: value for key, value in row.items() if key not in ("seconds", "peer")}
    seconds = row["seconds"]["rounds"]
    once = iter(seconds)
    benchmark.pedantic(lambda: replay(next(once)), rounds=len(seconds))

"""Defines the options of `pytest benchmarks --benchmark-only`, and the one measurement behind all peers of a case."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from benchmarks.operators import results
from benchmarks.operators.campaign import Case, blank, cases, run_case
from benchmarks.operators.results import Status
from benchmarks.operators.shapes import LOGITS
from benchmarks.operators.tables import table
from benchmarks.operators.timing import CLOCKS

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
DEFAULT_DTYPES = {"cpu": "float32", "cuda": "bfloat16"}  # training uses these there
DEFAULT_SHAPES = {"cpu": "cpu", "cuda": "standard"}


def pytest_addoption(parser):
    group = parser.getgroup("operators")
    group.addoption("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    group.addoption("--shapes", choices=tuple(LOGITS), help="which shapes; default: cpu, on CUDA standard")
    group.addoption("--dtype", choices=tuple(DTYPES), help="of the operands; default: float32, on CUDA bfloat16")
    group.addoption("--rounds", type=int, help="timed rounds per case; default: by the time that one takes")
    group.addoption("--clock", default="wall", choices=tuple(CLOCKS), help="on a CPU; cpu: all threads' seconds")
    group.addoption("--out", type=Path, default=results.FOLDER, help="folder of the JSON file")
    group.addoption("--budget-s", type=float, default=float("inf"), help="start no case after so many seconds")


class Campaign:
    """All cases of one pytest run; each is measured when the first of its peers is asked for."""

    def __init__(self, config: pytest.Config):
        self.device = torch.device(config.getoption("device"))
        self.clock = config.getoption("clock")
        self.rounds = config.getoption("rounds")
        self.path = results.results_path(config.getoption("out"), self.device)
        self.surroundings = results.environment(self.device)
        self.start = time.monotonic()
        self.deadline = self.start + config.getoption("budget_s")
        self.entries: dict[str, dict] = {}

    def row(self, case: Case, peer_name: str) -> dict:
        if str(case) not in self.entries:
            self.entries[str(case)] = self._measure(case)
            self._save()
        return next(row for row in self.entries[str(case)]["rows"] if row["peer"] == peer_name)

    def _measure(self, case: Case) -> dict:
        if time.monotonic() > self.deadline:
            return _not_measured(case, Status.SKIPPED, "out of time (--budget-s)")
        try:
            return run_case(case, self.rounds, self.clock)
        except Exception as error:
            # Ours is wrong or cannot run: its peers are not timed either, but later cases are.
            return _not_measured(case, Status.FAILED, f"lens_kernels: {type(error).__name__}: {error}")

    def _save(self) -> None:
        self.surroundings["total_seconds"] = round(time.monotonic() - self.start, 1)
        results.write(self.path, self.surroundings, list(self.entries.values()))


def _not_measured(case: Case, status: Status, reason: str) -> dict:
    rows = [blank(peer, status, reason) for peer in case.operator.peers]
    return {"case": str(case), "operator": case.operator.name, "rows": rows}


def pytest_generate_tests(metafunc):
    if "case" not in metafunc.fixturenames:
        return
    device = torch.device(metafunc.config.getoption("device"))
    which = metafunc.config.getoption("shapes") or DEFAULT_SHAPES[device.type]
    dtype = DTYPES[metafunc.config.getoption("dtype") or DEFAULT_DTYPES[device.type]]
    pairs = [(case, peer.name) for case in cases(which, dtype, device) for peer in case.operator.peers]
    metafunc.parametrize(("case", "peer"), pairs, ids=[f"{case}-{peer.replace(' ', '_')}" for case, peer in pairs])


@pytest.fixture(scope="session")
def campaign(pytestconfig) -> Campaign:
    pytestconfig.campaign = Campaign(pytestconfig)
    return pytestconfig.campaign


def pytest_terminal_summary(terminalreporter, config):
    campaign = getattr(config, "campaign", None)
    if campaign is None:
        return
    for entry in campaign.entries.values():
        terminalreporter.write_line(table(entry) + "\n")
    terminalreporter.write_line(f"written: {campaign.path}")
    terminalreporter.write_line(f"figures: python -m benchmarks.operators.figures {campaign.path}")

"""Runs all that a GPU has to answer, the worthiest case first, in as many calls as it takes.

    make gpu-pack                                       # before, where there is a network: wheels into .gpu-pack
    python3 -m benchmarks.gpu_day --out DIR             # on the machine; again, with the same DIR: goes on
    python3 -m benchmarks.gpu_day --out DIR --rehearse  # the same code at tiny sizes, without a GPU

DIR gets journal.jsonl (all that was found), summary.md, operators.json (for benchmarks.operators.figures) and log.txt.
GPU_DAY.md beside this file says more. Exit status: 0 all done, 1 something failed, 3 cases are left for another call.
"""

import argparse
import fnmatch
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.gpu_session import pack
from benchmarks.gpu_session.journal import Journal, JournalError, Outcome, Record, Status
from benchmarks.gpu_session.machine import name_of
from benchmarks.gpu_session.plan import CALL_S, ENDING_S, Case, filled, plan
from benchmarks.gpu_session.reading import NO_DEVICE, READERS, Finding
from benchmarks.gpu_session.running import ROOT, Ended, run
from benchmarks.gpu_session.summary import is_left, render

LEFT = 3
"""The exit status of a call after which cases are left."""
_CLOSING_S = 5.0
"""What a call keeps of its time for the summary."""
_CUT_OFF_LIMIT = 2
_REHEARSAL_PATIENCE = 5
"""A CPU, and Triton's interpreter, take so many times as long even at tiny sizes."""
_LOG_BYTES = 64 << 10
_TAIL_CHARACTERS = 6000


class SessionError(Exception):
    """Nothing can be run here; the message says why and what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """What all cases of a call have in common."""

    journal: Journal
    out: Path
    scratch: Path
    """A folder that lasts as long as the machine: installed wheels, models, data."""
    environment: Mapping[str, str]
    machine: str
    has_device: bool
    commit: str
    rehearse: bool
    deadline: float
    """In seconds of time.monotonic()."""

    @property
    def seconds_left(self) -> float:
        return self.deadline - time.monotonic()


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the cases that are left; returns the exit status."""
    parsed = _parser().parse_args(arguments)
    deadline = time.monotonic() + parsed.minutes * 60 - _CLOSING_S
    cases = plan(ROOT)
    for option, pattern in (("--only", parsed.only), ("--again", parsed.again)):
        if pattern and not any(fnmatch.fnmatch(case.name, pattern) for case in cases):
            names = ", ".join(repr(case.name) for case in cases)
            print(f"error: {option} {pattern}: no case has such a name; they are: {names}", file=sys.stderr)
            return 2
    try:
        return run_cases(cases, _open(parsed, deadline), only=parsed.only, again=parsed.again)
    except (SessionError, JournalError, pack.PackError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def run_cases(cases: Sequence[Case], session: Session, *, only: str = "*", again: str = "") -> int:
    """Runs the cases that are left or whose names match `again`, of those whose names match `only`, and writes the
    summary of all; returns the exit status.

    Raises JournalError where what was found cannot be kept.
    """
    wanted = [case for case in cases if fnmatch.fnmatch(case.name, only)]
    for case in _waiting(wanted, session, again):
        _run_one(case, session)
    record = session.journal.read()
    _summarise(cases, record, session)
    if any(is_left(record.outcomes.get(case.name)) for case in wanted):
        return LEFT
    return int(any(record.outcomes[case.name].status is Status.FAILED for case in wanted))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results, of earlier calls too")
    parser.add_argument("--minutes", type=float, default=CALL_S / 60, help="time of this call; default: %(default)s")
    parser.add_argument("--only", default="*", help="run only the cases whose names match, as in 'tests *'")
    parser.add_argument("--again", default="", help="run these again, though they have ended, as in 'question l2'")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes, without a GPU")
    parser.add_argument("--pack", type=Path, default=ROOT / ".gpu-pack", help="folder that `make gpu-pack` has made")
    parser.add_argument("--no-pack", action="store_true", help="this Python has all that is needed")
    scratch = Path(tempfile.gettempdir()) / "lens-gpu-day"
    parser.add_argument("--scratch", type=Path, default=scratch, help="folder for wheels, models and data")
    return parser


def _open(parsed: argparse.Namespace, deadline: float) -> Session:
    scratch, out = parsed.scratch.absolute(), parsed.out.absolute()  # cases run in the project's folder
    scratch.mkdir(parents=True, exist_ok=True)
    site = None if parsed.no_pack else pack.install(parsed.pack, scratch / "site")
    environment = _environment(os.environ, site)
    machine = _machine(environment)
    return Session(
        journal=Journal(out / "journal.jsonl"),
        out=out,
        scratch=scratch,
        environment=environment,
        machine=name_of(machine),
        has_device=machine["gpu"] is not None,
        commit=_commit(),
        rehearse=parsed.rehearse,
        deadline=deadline,
    )


def _environment(given: Mapping[str, str], site: Path | None) -> dict[str, str]:
    """Returns `given` with the places of our packages and of the pack's, before those of the machine."""
    places = [*([str(site)] if site else []), str(ROOT), str(ROOT / "kernels"), given.get("PYTHONPATH", "")]
    return {**given, "PYTHONPATH": os.pathsep.join(filter(None, places)), "PYTHONUNBUFFERED": "1"}


def _machine(environment: Mapping[str, str]) -> dict[str, Any]:
    """Describes the machine in a process of its own: this one must never hold the device."""
    command = [sys.executable, "-m", "benchmarks.gpu_session.machine"]
    done = subprocess.run(command, cwd=ROOT, env=dict(environment), capture_output=True, text=True)
    if done.returncode:
        last = done.stderr.strip().split("\n")[-1]
        raise SessionError(f"the machine cannot be described: {last}; torch must be importable by {sys.executable}")
    return json.loads(done.stdout.strip().split("\n")[-1])


def _commit() -> str:
    """Returns the commit, or what a checkout without its history says."""
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()


def _waiting(cases: Iterable[Case], session: Session, again: str) -> list[Case]:
    """Returns the cases that are still to be run. One that was skipped is tried again on another machine."""
    outcomes = session.journal.read().outcomes

    def is_due(case: Case) -> bool:
        outcome = outcomes.get(case.name)
        if outcome is None or is_left(outcome) or fnmatch.fnmatch(case.name, again):
            return True
        return outcome.status is Status.SKIPPED and outcome.machine != session.machine

    return [case for case in cases if is_due(case)]


def _run_one(case: Case, session: Session) -> None:
    """Runs a case if there is time, and writes down how it ended."""
    obstacle = _obstacle(case, session)
    if obstacle is not None:
        _write(session, case, obstacle, None)
        return
    if session.seconds_left < (1.0 if session.rehearse else case.expected_s):
        print(f"{case.name}: left for the next call, which has more time", flush=True)
        return
    session.journal.started(case.name)
    print(f"{case.name} ...", flush=True)
    longest = case.limit_s * (_REHEARSAL_PATIENCE if session.rehearse else 1)
    limit = max(1.0, min(longest, session.seconds_left))
    with tempfile.TemporaryDirectory(dir=session.scratch) as folder:
        places = {"python": sys.executable, "result": folder, "scratch": session.scratch}
        places |= {"budget": round(max(1.0, limit - ENDING_S), 1)}
        command = filled(case.rehearsal if session.rehearse else case.command, places)
        extra = case.rehearsal_environment if session.rehearse else case.environment
        environment = {**session.environment, **dict(extra)}
        ended = run(command, limit_s=limit, log=Path(folder) / "log", environment=environment)
        finding = READERS[case.reader](ended, Path(folder))
    _write(session, case, _judged(finding, ended, session, limit, cut_short=limit < longest), ended)


def _obstacle(case: Case, session: Session) -> Finding | None:
    """Returns why a case is not even begun, or None."""
    if session.rehearse and not case.rehearsal:
        return Finding(Status.SKIPPED, f"it cannot be rehearsed: {case.without_rehearsal}")
    if case.tool and not session.rehearse and shutil.which(case.tool) is None:
        return Finding(Status.SKIPPED, f"{case.tool} is not on PATH")
    if session.journal.read().cut_off[case.name] >= _CUT_OFF_LIMIT:
        why = (
            "two calls ended while it ran, so that it may have hung or crashed the machine; --again tries it once more"
        )
        return Finding(Status.FAILED, why)
    return None


def _judged(finding: Finding, ended: Ended, session: Session, limit: float, *, cut_short: bool) -> Finding:
    """Corrects what the files alone cannot tell: a limit that was the call's, and a device that was there."""
    if ended.timed_out and cut_short:
        return replace(finding, status=Status.INTERRUPTED, reason="the call's time was over")
    if ended.timed_out:
        return replace(finding, status=Status.FAILED, reason=f"it took longer than {limit:.0f} s")
    if session.has_device and finding.status is Status.SKIPPED and finding.reason == NO_DEVICE:
        return replace(finding, status=Status.FAILED, reason="it did not find the CUDA device that is there")
    return finding


def _write(session: Session, case: Case, finding: Finding, ended: Ended | None) -> None:
    outcome = Outcome(
        case=case.name,
        status=finding.status,
        reason=finding.reason,
        headline=finding.headline,
        seconds=round(ended.seconds, 1) if ended else 0.0,
        result=finding.result,
        log_tail=ended.log[-_TAIL_CHARACTERS:] if ended else "",
        machine=session.machine,
        commit=session.commit,
    )
    print(f"{case.name}: {outcome.status}: {outcome.reason or outcome.headline} ({outcome.seconds:.0f} s)", flush=True)
    session.journal.ended(outcome)
    if ended:
        with (session.out / "log.txt").open("a") as file:
            file.write(f"\n===== {case.name}: {outcome.status}\n{ended.log[-_LOG_BYTES:]}")


def _summarise(cases: Sequence[Case], record: Record, session: Session) -> None:
    page = render(cases, record)
    (session.out / "summary.md").write_text(page)
    operators = _operator_results(record)
    if operators is not None:
        (session.out / "operators.json").write_text(json.dumps(operators, indent=1) + "\n")
    print(page)


def _operator_results(record: Record) -> dict[str, Any] | None:
    """Joins the results of all operator cases into one document, of the form that `benchmarks.operators` writes."""
    documents = [o.result for o in record.outcomes.values() if o.case.startswith("operators ") and o.result]
    if not documents:
        return None
    return documents[-1] | {"cases": [entry for document in documents for entry in document.get("cases", [])]}


if __name__ == "__main__":
    sys.exit(main())

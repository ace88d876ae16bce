"""Says what a case's command has found, from its exit status and the files that it left."""

import json
import re
import xml.etree.ElementTree
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu_session.journal import Status
from benchmarks.gpu_session.running import Ended

NO_DEVICE = "needs a CUDA device"
"""What a case's program says, as the last thing, when it has got so far that only the device is missing."""
LEFT_OUT = "left out: "
"""How a case's program begins the line that says why the case cannot run on this machine."""
_TORCH_WITHOUT_DEVICE = (
    "Torch not compiled with CUDA enabled",
    "Found no NVIDIA driver on your system",
    "No CUDA GPUs are available",
)
_NOTHING_SELECTED = 5
"""pytest's exit status when no test was left to run."""
_MESSAGE = 800
_LAST_LINES = 40
"""pytest ends with a line per test that could not run."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What a command has found."""

    status: Status
    reason: str = ""
    headline: str = ""
    result: dict[str, Any] = field(default_factory=dict)


Reader = Callable[[Ended, Path], Finding]
"""Takes how the command ended and the folder in which it left its files."""


def read_json(ended: Ended, folder: Path) -> Finding:
    """Reads result.json, an object with a `headline`, of one of our own programs."""
    result = _object(folder / "result.json")
    if ended.status:
        return _not_done(ended, result)
    if "headline" not in result:
        return Finding(Status.FAILED, "it ended well but left no result.json with a headline", result=result)
    return Finding(Status.MEASURED, headline=result["headline"], result=result)


def read_pytest(ended: Ended, folder: Path) -> Finding:
    """Reads junit.xml: how many tests passed, and every other one by name."""
    if ended.status == _NOTHING_SELECTED and "no tests ran" not in ended.log and "deselected" not in ended.log:
        return Finding(Status.FAILED, "pytest found no test")
    tests = _junit(folder / "junit.xml")
    count = Counter(test["outcome"] for test in tests)
    others = [test for test in tests if test["outcome"] != "passed"]
    result = {"count": dict(count), "not_passed": others}
    headline = ", ".join(f"{number} {outcome}" for outcome, number in sorted(count.items())) or "no tests"
    failed = [test["name"] for test in others if test["outcome"] == "failed"]
    if failed:
        return Finding(Status.FAILED, f"{len(failed)} failed: {', '.join(failed)}", headline, result)
    if ended.status == _NOTHING_SELECTED or (tests and not count["passed"] and not ended.status):
        reasons = sorted({test["message"] for test in others}) or ["no test of this file runs on this machine"]
        return Finding(Status.SKIPPED, "; ".join(reasons), headline, result)
    if ended.status:
        return _not_done(ended, result)
    return Finding(Status.PASSED, headline=headline, result=result)


def read_operators(ended: Ended, folder: Path) -> Finding:
    """Reads the file of `pytest benchmarks`: each operator beside its peers."""
    documents = [_object(path) for path in sorted(folder.glob("operators_*.json"))]
    result = documents[-1] if documents else {}
    rows = [(entry["case"], row) for entry in result.get("cases", []) for row in entry["rows"]]
    if not rows:
        return _not_done(ended, result) if ended.status else Finding(Status.FAILED, "it left no results")
    count = Counter(row["status"] for _, row in rows)
    headline = ", ".join(f"{number} {status}" for status, number in sorted(count.items()))
    ours = [row for _, row in rows if row["peer"] == "lens_kernels"]
    if all(_lacks_device(row["reason"]) for row in ours):
        return Finding(Status.SKIPPED, NO_DEVICE, headline, result)
    wrong = [f"{case}: {row['reason']}" for case, row in rows if row["peer"] == "lens_kernels" and _is_bad(row)]
    if wrong:
        return Finding(Status.FAILED, "; ".join(wrong), headline, result)
    if ended.status:
        return _not_done(ended, result)
    return Finding(Status.MEASURED, headline=headline, result=result)


def read_sanitizer(ended: Ended, folder: Path) -> Finding:
    """Reads what compute-sanitizer says at the end, and the tests that ran under it."""
    summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (.*)", ended.log)
    tests = read_pytest(ended, folder)
    if "Device not supported" in ended.log:
        return Finding(Status.SKIPPED, "compute-sanitizer says that it does not support this device here")
    if not summary or tests.status is not Status.PASSED:
        return tests
    errors = [line for line in ended.log.splitlines() if line.startswith("=========")][-60:]
    if not re.match(r"0 (errors|hazards)", summary[-1]):
        return Finding(Status.FAILED, summary[-1], tests.headline, tests.result | {"sanitizer": errors})
    return Finding(Status.PASSED, headline=f"{tests.headline}; {summary[-1]}", result=tests.result)


def read_trainer(ended: Ended, folder: Path) -> Finding:
    """Reads the file of `benchmarks.trainer gpu`; ours is kept where only the peer failed."""
    documents = [_object(path) for path in sorted(folder.glob("trainer_gpu_*.json"))]
    result = documents[-1] if documents else {}
    if ended.status or "ours" not in result:
        return _not_done(ended, result)
    parts = [_trainer_case(case, result) for case in result["ours"]]
    if "peer_left_out" in result:
        parts.append(f"no peer: {result['peer_left_out']}")
    changed = [case["name"] for case in result["ours"] if not case.get("hand_over", {}).get("unchanged", True)]
    if changed:
        return Finding(Status.FAILED, "the hand-over to host memory changed the policy", "; ".join(parts), result)
    return Finding(Status.MEASURED, headline="; ".join(parts), result=result)


def _trainer_case(case: dict[str, Any], result: dict[str, Any]) -> str:
    ours = case["sides"]["ours"]
    mfu = {phase: spread["median"] for phase, spread in ours["mfu"].items()}
    text = f"{case['name']}: MFU update {mfu['update_actor']:.2f}, ref {mfu['ref']:.2f}"
    planned = result["planned"]["bytes"][case["name"]]["peak"]
    if "peak_mib_in_all" in case:
        text += f", peak {case['peak_mib_in_all'] / 1024:.1f} GiB of {planned / 2**30:.1f} planned"
    for name, cases in result.items():
        if name.startswith("transformers") and cases:
            other = next(c for c in cases if c["name"] == case["name"])
            side = other["sides"].get(name)
            text += f", {name}: {_peer_speed(side, ours) if side else 'WRONG'}"
    return text


def _peer_speed(theirs: dict[str, Any], ours: dict[str, Any]) -> str:
    ratio = ours["tokens_per_s"]["median"] / theirs["tokens_per_s"]["median"]
    return f"MFU update {theirs['mfu']['update_actor']['median']:.2f}, ours {ratio:.2f} times as fast"


def read_compiled(ended: Ended, folder: Path) -> Finding:
    """Reads the list of kernels that tests/kernels/compiled_kernels.py prints."""
    lines = [line for line in ended.log.splitlines() if line.startswith("[{")]
    if ended.status or not lines:
        return _not_done(ended, {})
    kernels = json.loads(lines[-1])
    spilled = sorted({f"{k['kernel']} ({k['case']})" for k in kernels if k.get("spilled_bytes")})
    architectures = sorted({k["architecture"] for k in kernels})
    headline = f"{len(kernels)} kernels for {', '.join(f'sm_{a}' for a in architectures)}; spills: {spilled or 'none'}"
    return Finding(Status.MEASURED, headline=headline, result={"kernels": kernels})


READERS: dict[str, Reader] = {
    "json": read_json,
    "pytest": read_pytest,
    "operators": read_operators,
    "sanitizer": read_sanitizer,
    "trainer": read_trainer,
    "compiled": read_compiled,
}


def _is_bad(row: dict[str, Any]) -> bool:
    return row["status"] in ("failed", "wrong")


def _lacks_device(text: str) -> bool:
    return any(words in text for words in (NO_DEVICE, *_TORCH_WITHOUT_DEVICE))


def _not_done(ended: Ended, result: dict[str, Any]) -> Finding:
    """Says why a command with a bad exit status stopped: the last lines of its output hold it."""
    lines = [line.strip() for line in ended.log.splitlines() if line.strip()]
    for line in reversed(lines[-_LAST_LINES:]):
        if line.startswith(LEFT_OUT):
            return Finding(Status.SKIPPED, line.removeprefix(LEFT_OUT), result=result)
        if _lacks_device(line):
            return Finding(Status.SKIPPED, NO_DEVICE, result=result)
    last = lines[-1][:_MESSAGE] if lines else "it printed nothing"
    return Finding(Status.FAILED, f"exit status {ended.status}: {last}", result=result)


def _object(path: Path) -> dict[str, Any]:
    """Returns the JSON object in `path`, or an empty one where there is none: the exit status then tells why."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _junit(path: Path) -> list[dict[str, str]]:
    try:
        cases = list(xml.etree.ElementTree.parse(path).iter("testcase"))
    except (OSError, xml.etree.ElementTree.ParseError):
        return []
    return [_test(case) for case in cases]


def _test(case: xml.etree.ElementTree.Element) -> dict[str, str]:
    found = {"name": f"{case.get('classname', '')}::{case.get('name', '')}".removeprefix("::"), "outcome": "passed"}
    for tag, outcome in (("skipped", "skipped"), ("failure", "failed"), ("error", "failed")):
        element = case.find(tag)
        if element is not None:
            message = element.get("message") or ""
            detail = (element.text or "") if outcome == "failed" else ""
            found |= {"outcome": outcome, "message": message[:_MESSAGE], "detail": detail[-2 * _MESSAGE :]}
    return found

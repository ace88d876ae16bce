"""The day on a GPU: what is run in which order, and what survives a kill, a hang, a full disk. No GPU is needed."""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import gpu_day
from benchmarks.gpu_session import pack, reading
from benchmarks.gpu_session.journal import Journal, JournalError, Outcome, Status
from benchmarks.gpu_session.lens_run import headline, mistakes_of
from benchmarks.gpu_session.plan import CALL_S, MACHINE, Case, filled, plan
from benchmarks.gpu_session.running import ROOT, Ended, run
from benchmarks.gpu_session.summary import render

PATIENCE_S = 120
WRITE = "import json, sys; json.dump({'headline': 'done'}, open(sys.argv[1] + '/result.json', 'w'))"


def wait_until(condition):
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"  # a zombie has ended; its parent has not read that yet


def case(name: str, program: str = WRITE, **changes) -> Case:
    made = replace(MACHINE, name=name, command=("{python}", "-c", program, "{result}"), expected_s=0.0, limit_s=60.0)
    return replace(made, **changes)


def session(folder: Path, **changes) -> gpu_day.Session:
    (folder / "scratch").mkdir(exist_ok=True)
    made = gpu_day.Session(
        journal=Journal(folder / "out" / "journal.jsonl"),
        out=folder / "out",
        scratch=folder / "scratch",
        environment=dict(os.environ),
        machine="a GPU",
        has_device=True,
        commit="c0ffee",
        rehearse=False,
        deadline=time.monotonic() + PATIENCE_S,
    )
    return replace(made, **changes)


# ---- the plan -----------------------------------------------------------------------------------------------------


def test_the_worthiest_come_first_and_every_case_can_end_within_a_call():
    cases = plan(ROOT)
    names = [found.name for found in cases]
    assert len(set(names)) == len(names)
    order = ["machine", "tests kernels/test_gpu", "tests kernels/test_linear", "operators linear T8192-V128256-H4096",
             "question paths", "trainer qwen2.5-1.5b", "lens random-1.5b", "sanitizer memcheck", "trainer qwen2.5-3b",
             "lens demo"]  # fmt: skip
    assert [name for name in names if name in order] == order
    for found in cases:
        assert found.expected_s < found.limit_s <= CALL_S - 30, found
        assert found.reader in reading.READERS and found.answers
        assert bool(found.rehearsal) != bool(found.without_rehearsal), found
    tested = {path.stem for path in ROOT.glob("tests/kernels/test_*.py")}
    assert {name.removeprefix("tests kernels/") for name in names if name.startswith("tests kernels/")} == tested


def test_every_command_names_files_and_modules_that_are_there():
    places = {"python": sys.executable, "result": "result", "scratch": "scratch", "budget": 1}
    for found in plan(ROOT):
        for command in filter(None, (found.command, found.rehearsal)):
            words = filled(command, places)
            modules = [words[i + 1] for i, word in enumerate(words) if word == "-m" and words[i - 1] == sys.executable]
            assert all(importlib.util.find_spec(module) for module in modules), words
            assert all((ROOT / word).exists() for word in words if word.endswith(".py")), words


# ---- the journal --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", [b'{"event": "ended", "case": "b", "sta', b"{}\n", b"[1]\n", b"7\n", b"\xff\xfe\n"])
def test_a_damaged_line_costs_its_own_case_only(damage: bytes, tmp_path: Path):
    journal = Journal(tmp_path / "journal.jsonl")
    journal.ended(Outcome(case="a", status=Status.PASSED))
    journal.started("b")
    with journal.path.open("ab") as file:
        file.write(damage)
    journal.ended(Outcome(case="c", status=Status.FAILED, reason="why"))
    record = journal.read()
    assert {name: outcome.status for name, outcome in record.outcomes.items()} == {"a": "passed", "c": "failed"}
    assert record.cut_off == {"b": 1} and record.unreadable == (3,)
    assert "Lines 3 of the journal cannot be read" in render([case("a"), case("b")], record)


def test_a_full_disk_ends_the_call_before_anything_is_run(tmp_path: Path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "journal.jsonl").symlink_to("/dev/full")
    ran = tmp_path / "ran"
    with pytest.raises(JournalError, match="No space left on device; .* MiB are free there.*give another --out"):
        gpu_day.run_cases([case("a", f"open({str(ran)!r}, 'w')")], session(tmp_path))
    assert not ran.exists()


# ---- running ------------------------------------------------------------------------------------------------------


def test_a_limit_ends_every_process_also_those_in_sessions_of_their_own(tmp_path: Path):
    script = f"setsid sleep 1000 & echo $! > {tmp_path}/pid; exec sleep 1000"
    ended = run(["sh", "-c", script], limit_s=2, log=tmp_path / "log", environment=dict(os.environ))
    assert ended.timed_out and "it took longer than 2 s" in ended.log
    assert not alive(int((tmp_path / "pid").read_text()))


def test_a_case_that_ends_well_leaves_no_process_either(tmp_path: Path):
    script = f"setsid sleep 1000 & echo $! > {tmp_path}/pid; exit 3"
    ended = run(["sh", "-c", script], limit_s=60, log=tmp_path / "log", environment=dict(os.environ))
    assert ended.status == 3 and not alive(int((tmp_path / "pid").read_text()))


def test_a_crash_costs_its_own_case_only(tmp_path: Path, capsys):
    cases = [case("crash", "import os; os.abort()"), case("hang", "import time; time.sleep(1000)", limit_s=1.0)]
    cases += [case("no file", "print('nothing')"), case("good")]
    assert gpu_day.run_cases(cases, session(tmp_path)) == 1
    found = session(tmp_path).journal.read().outcomes
    assert [found[c.name].status for c in cases] == ["failed", "failed", "failed", "measured"]
    assert "exit status 134" in found["crash"].reason and found["hang"].reason == "it took longer than 1 s"
    assert found["no file"].reason == "it ended well but left no result.json with a headline"
    page = (tmp_path / "out" / "summary.md").read_text()
    assert "* **hang**: it took longer than 1 s" in page and "## Failed: 3" in page and "| good | measured |" in page
    assert gpu_day.run_cases(cases, session(tmp_path)) == 1  # all have ended: nothing runs again
    assert len((tmp_path / "out" / "journal.jsonl").read_text().splitlines()) == 8


DRIVER = """
import sys, time
from pathlib import Path
sys.path[:0] = [{root!r}, {tests!r}]
from test_gpu_day import case, session
from benchmarks import gpu_day
folder = Path({folder!r})
stuck = 'setsid sleep 1000 & echo $! > {folder}/pid; test -e {folder}/free || exec sleep 1000; '
stuck += 'kill $!; echo \\'{{"headline": "late"}}\\' > $0/result.json'
count = "open({folder!r} + '/count', 'a').write('x'); import json, sys; "
count += "json.dump({{'headline': 'once'}}, open(sys.argv[1] + '/result.json', 'w'))"
cases = [case('first', count), case('stuck', command=('sh', '-c', stuck, '{{result}}'), limit_s=1e6), case('last')]
sys.exit(gpu_day.run_cases(cases, session(folder, deadline=time.monotonic() + 1e6)))  # no limit may end what is stuck
"""


def test_after_a_kill_the_next_call_goes_on_and_nothing_is_left_behind(tmp_path: Path):
    driver = [sys.executable, "-c", DRIVER.format(root=str(ROOT), tests=str(ROOT / "tests"), folder=str(tmp_path))]
    first = subprocess.Popen(driver)
    pid = tmp_path / "pid"
    wait_until(lambda: pid.exists() and pid.read_text().strip())
    first.send_signal(signal.SIGKILL)
    first.wait()
    orphan = int(pid.read_text())
    wait_until(lambda: not alive(orphan))
    record = Journal(tmp_path / "out" / "journal.jsonl").read()
    assert list(record.outcomes) == ["first"] and record.cut_off == {"stuck": 1}
    (tmp_path / "free").touch()
    assert subprocess.run(driver, timeout=PATIENCE_S).returncode == 0
    found = Journal(tmp_path / "out" / "journal.jsonl").read().outcomes
    assert {name: outcome.headline for name, outcome in found.items()} == {
        "first": "once", "stuck": "late", "last": "done"
    }  # fmt: skip
    assert (tmp_path / "count").read_text() == "x"


def test_a_case_that_ended_two_calls_is_not_begun_a_third_time(tmp_path: Path):
    now = session(tmp_path)
    for _ in range(2):
        now.journal.started("a")
    assert gpu_day.run_cases([case("a")], now) == 1
    assert "two calls ended while it ran" in now.journal.read().outcomes["a"].reason
    assert gpu_day.run_cases([case("a")], now, again="a") == 0


def test_what_does_not_fit_into_a_call_waits_for_the_next(tmp_path: Path):
    soon = session(tmp_path, deadline=time.monotonic() + 3)
    cases = [case("long", "import time; time.sleep(1000)"), case("too long", expected_s=50.0)]
    assert gpu_day.run_cases(cases, soon) == gpu_day.LEFT
    assert soon.journal.read().outcomes["long"].status is Status.INTERRUPTED
    page = (tmp_path / "out" / "summary.md").read_text()
    assert "## Left for the next call: 2\n\n* long\n* too long\n" in page
    assert gpu_day.run_cases([replace(c, command=case("x").command) for c in cases], session(tmp_path)) == 0


def test_skips_have_reasons_and_are_tried_again_on_another_machine(tmp_path: Path):
    lacking = case("no device", "print('needs a CUDA device'); raise SystemExit(1)")
    cases = [case("tool", tool="no-such-tool"), lacking, case("asleep", rehearsal=(), without_rehearsal="no need")]
    here = session(tmp_path, has_device=False, machine="no GPU")
    assert gpu_day.run_cases(cases, here) == 0
    reasons = {o.case: o.reason for o in here.journal.read().outcomes.values() if o.status is Status.SKIPPED}
    assert reasons == {"tool": "no-such-tool is not on PATH", "no device": "needs a CUDA device"}
    assert "* **tool**: no-such-tool is not on PATH" in (tmp_path / "out" / "summary.md").read_text()
    assert gpu_day.run_cases(cases, session(tmp_path)) == 1
    assert here.journal.read().outcomes["no device"].reason == "it did not find the CUDA device that is there"
    other = session(tmp_path / "out", rehearse=True)
    assert gpu_day.run_cases(cases[2:], other) == 0
    assert other.journal.read().outcomes["asleep"].reason == "it cannot be rehearsed: no need"


# ---- reading ------------------------------------------------------------------------------------------------------

JUNIT = """<testsuites><testsuite><testcase classname="tests.a" name="test_one"/><testcase classname="tests.a"
name="test_two">{}</testcase></testsuite></testsuites>"""


@pytest.mark.parametrize(
    "inside, status, end, reason",
    [
        ("", 0, Status.PASSED, ""),
        ('<failure message="1 != 2">there</failure>', 1, Status.FAILED, "1 failed: tests.a::test_two"),
        ('<error message="no import">there</error>', 1, Status.FAILED, "1 failed: tests.a::test_two"),
        ('<skipped message="needs X"/>', 0, Status.PASSED, ""),
        ("", 139, Status.FAILED, "exit status 139: last words"),
    ],
)
def test_tests_are_read_by_name(inside: str, status: int, end: Status, reason: str, tmp_path: Path):
    (tmp_path / "junit.xml").write_text(JUNIT.format(inside))
    found = reading.read_pytest(Ended(status, 1.0, "last words"), tmp_path)
    assert (found.status, found.reason) == (end, reason)
    assert len(found.result["not_passed"]) == bool(inside)


def test_no_test_and_no_file_are_told_apart(tmp_path: Path):
    deselected = reading.read_pytest(Ended(5, 1.0, "=== 9 deselected in 0.1s ==="), tmp_path)
    assert deselected.status is Status.SKIPPED and "no test of this file" in deselected.reason
    assert reading.read_pytest(Ended(4, 1.0, "ERROR: file not found"), tmp_path).status is Status.FAILED


def test_operators_fail_only_if_ours_do(tmp_path: Path):
    def read(*rows: tuple[str, str, str]) -> reading.Finding:
        rows = [dict(zip(("peer", "status", "reason"), row, strict=True)) for row in rows]
        (tmp_path / "operators_cuda_1.json").write_text(json.dumps({"cases": [{"case": "c", "rows": rows}]}))
        return reading.read_operators(Ended(0, 1.0, ""), tmp_path)

    ours = ("lens_kernels", "measured", "")
    assert read(ours, ("verl", "failed", "no")).headline == "1 failed, 1 measured"
    assert read(ours, ("verl", "failed", "no")).status is Status.MEASURED
    assert read(("lens_kernels", "failed", "boom")).reason == "c: boom"
    without = read(("lens_kernels", "failed", "AssertionError: Torch not compiled with CUDA enabled"))
    assert (without.status, without.reason) == (Status.SKIPPED, reading.NO_DEVICE)


@pytest.mark.parametrize(
    "last, end",
    [("ERROR SUMMARY: 0 errors", Status.PASSED), ("ERROR SUMMARY: 2 errors", Status.FAILED),
     ("RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", Status.PASSED),
     ("RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)", Status.FAILED)],
)  # fmt: skip
def test_the_sanitizer_has_the_last_word(last: str, end: Status, tmp_path: Path):
    (tmp_path / "junit.xml").write_text(JUNIT.format(""))
    assert reading.read_sanitizer(Ended(0, 1.0, f"========= {last}\n"), tmp_path).status is end


def test_steps_that_are_missing_or_not_finite_are_mistakes():
    row = {"step": 1, "actor/loss": 0.5, "timing_s/step": 2.0, "lens/purified_rate": 0.25}
    assert headline([row, row], 2) == "2 of 2 steps; step 2.00 s; 0.0 GB; purified 0.25"
    assert mistakes_of([row], 2) == ["1 steps were made, 2 were to be"]
    assert mistakes_of([row | {"actor/loss": float("nan")}], 1) == ["step 1: actor/loss is not finite"]


# ---- the pack -----------------------------------------------------------------------------------------------------


def wheel(folder: Path, name: str, *needs: str) -> Path:
    path = folder / f"{name}-1.0-py3-none-any.whl"
    info = f"{name}-1.0.dist-info"
    lines = ["Metadata-Version: 2.1", f"Name: {name}", "Version: 1.0", *(f"Requires-Dist: {need}" for need in needs)]
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{name}.py", "VALUE = 1\n")
        archive.writestr(f"{info}/METADATA", "\n".join(lines) + "\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


def test_a_need_in_no_list_is_named(tmp_path: Path):
    needs = ("torch>=2", "Typing_Extensions", "ray", "pywin32; sys_platform=='win32'", "sphinx; extra=='docs'")
    made = pack.read_wheel(wheel(tmp_path, "some_lib", *needs, "old; python_version<'3.11'"))
    assert (made.name, made.needs) == ("some-lib", ("ray", "torch", "typing-extensions"))
    lists = pack.Lists(pack=tmp_path, target=frozenset({"torch", "typing-extensions"}), left_out={"ray": "too large"})
    pack.check([made], lists)
    assert "too large" in pack.table([made], lists)
    with pytest.raises(pack.PackError, match="some-lib needs ray: add the name to gpu-pack.txt"):
        pack.check([made], replace(lists, left_out={}))
    with pytest.raises(pack.PackError, match="61.0 MiB, more than 60; the largest is some-lib"):
        pack.check([replace(made, size=61 << 20)], lists)


def test_hashes_are_written_where_versions_are():
    text = "# why\nsome-lib==1.0 \\\n    --hash=sha256:aa\nother_lib==2\n"
    made = [pack.Wheel("some-lib", "1.0", 1, "bb", ()), pack.Wheel("other-lib", "2", 1, "cc", ())]
    expected = "# why\nsome-lib==1.0 \\\n    --hash=sha256:bb\nother_lib==2 \\\n    --hash=sha256:cc\n"
    assert pack.pinned(text, made) == pack.pinned(expected, made) == expected


def test_the_pack_has_the_versions_of_the_project():
    pins = dict(re.findall(r"^([\w-]+)==(\S+)", (ROOT / "requirements/gpu-pack.txt").read_text(), re.MULTILINE))
    wanted = dict(re.findall(r'"([\w-]+)==([^";]+)', (ROOT / "setup.py").read_text()))
    assert {name: pins[name] for name in ("megatron-core", "mbridge", "math-verify")}.items() <= wanted.items()
    peers = re.search(r"^PEERS := (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    lists = pack.read_lists(ROOT / "requirements")
    for name, version in (peer.split("==") for peer in re.findall(r"[\w-]+==[\w.]+", peers)):
        assert pins.get(name) == version or name in lists.left_out, name


def test_installing_twice_installs_once_and_no_pack_is_an_error(tmp_path: Path, monkeypatch):
    with pytest.raises(pack.PackError, match="no wheels there; run `make gpu-pack`"):
        pack.install(tmp_path / "none", tmp_path / "site")
    wheel(tmp_path, "some_lib", "not-there")
    assert (pack.install(tmp_path, tmp_path / "site") / "some_lib.py").is_file()
    monkeypatch.setattr(pack.subprocess, "run", lambda *_, **__: pytest.fail("it is installed already"))
    pack.install(tmp_path, tmp_path / "site")


# ---- the questions ------------------------------------------------------------------------------------------------


# They import torch, which the process that is killed above should not have to wait for.


@pytest.mark.parametrize("question", ["paths", "l2", "dw", "dlogits"])
def test_every_question_can_be_asked_at_a_tiny_size(question: str):
    import torch

    from benchmarks import gpu_questions

    found = gpu_questions.QUESTIONS[question](gpu_questions.TINY, torch.device("cpu"))
    assert found["headline"] and json.loads(json.dumps(found))
    if question == "paths":
        assert all(path["differs_from_first"] < 0.02 for path in found["paths"].values()), found["paths"]


def test_hit_share_by_hand():
    from benchmarks import gpu_questions

    assert gpu_questions.hit_share(read=3.0, far=6.0, near=2.0) == 0.75
    assert gpu_questions.hit_share(read=7.0, far=6.0, near=2.0) == 0.0
    assert gpu_questions.hit_share(read=1.0, far=6.0, near=2.0) == 1.0


def test_the_product_added_to_a_sum_is_added():
    import torch

    from benchmarks import gpu_questions

    total, a, b = torch.ones(3, 4), torch.randn(3, 2, dtype=torch.bfloat16), torch.randn(2, 4, dtype=torch.bfloat16)
    gpu_questions.added_product(total, a, b)
    torch.testing.assert_close(total, 1 + a.float() @ b.float())
    torch.testing.assert_close(gpu_questions.product(a, b, torch.empty(3, 4)), a.float() @ b.float())


# ---- the trainer's part -------------------------------------------------------------------------------------------


def test_the_budget_is_the_largest_that_the_plan_fits(tmp_path: Path):
    import torch

    from benchmarks.trainer import GPU_BATCHES
    from benchmarks.training import load, memory
    from lens_megatron.config import from_tree

    model = load.models_in(tmp_path, "tiny", torch.bfloat16)
    assert load.models_in(tmp_path, "tiny", torch.float32) == model  # what is there is used again
    tree = {"run": {"directory": "unused"}, "data": {"train": "unused"}}
    tree |= {"model": {"path": str(model), "dtype": "bfloat16"}}

    def needed(budget: int, layers: dict) -> int:
        config = from_tree(tree | {"megatron": {"transformer": layers}})
        return max(memory.planned_bytes(config, batch | {"budget": budget}, True).peak for batch in GPU_BATCHES)

    peaks = [needed(*choice) for choice in memory.CHOICES]
    assert peaks[0] > peaks[1] > peaks[2]
    for number in range(3):
        enough = int(peaks[number] / memory.USABLE) + 1
        assert memory.fitting_choice(tree, GPU_BATCHES, enough, True) == memory.CHOICES[number]
    with pytest.raises(ValueError, match="needs .* GiB at the least: take a smaller --shape"):
        memory.fitting_choice(tree, GPU_BATCHES, 1 << 20, True)


def test_attention_is_told_of_grouped_keys_where_it_asks():
    from lens_megatron.policy.layers import grouped_keys_argument

    assert grouped_keys_argument(lambda query, *, scale=None: None, True) == {}  # torch 2.11
    assert grouped_keys_argument(lambda query, *, enable_gqa=False: None, True) == {"enable_gqa": True}

"""Graders that are killed, stopped, or hostile; what they start; what they return; who waits for them."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from toy_runs import environment

from lens_megatron.reward import Grade, GraderPool, GradeStatus, grade
from lens_megatron.reward.process import GradingProcess

CORRECT, WRONG, TIMEOUT, CRASH = GradeStatus.CORRECT, GradeStatus.WRONG, GradeStatus.TIMEOUT, GradeStatus.CRASH
DEADLINE_S = 60.0


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


@pytest.fixture
def pool() -> Iterator[GraderPool]:
    with GraderPool(1, DEADLINE_S, "hostile_graders:misbehave") as pool:
        pool.wait_ready()
        yield pool


def only(pool: GraderPool, completion: str) -> Grade:
    ticket = pool.submit(completion, "")
    return pool.wait([ticket])[ticket]


def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen within {DEADLINE_S} s"
        time.sleep(0.02)


def pids(path: Path, count: int) -> list[int]:
    until(lambda: path.exists() and len(path.read_text().splitlines()) >= count, f"{count} processes in {path.name}")
    return [int(line) for line in path.read_text().split()]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


def worker(pool: GraderPool) -> GradingProcess:
    """One that is ready."""
    return next(process for process in pool._processes if process.ready and not process.has_died())


def test_a_worker_outlives_the_thread_that_started_it():
    def step(answers: list[str]) -> list[GradeStatus]:
        def sample() -> None:
            tickets = [pool.submit(answer, "") for answer in answers]
            grades.extend(pool.wait(tickets).values())

        grades: list[Grade] = []
        thread = threading.Thread(target=sample)
        thread.start()
        thread.join()
        return [grade.status for grade in grades]

    with GraderPool(1, 3.0, "hostile_graders:misbehave") as pool:
        assert step(["hang", "fine"]) == [TIMEOUT, CORRECT]
        for _ in range(3):
            assert step(["fine", "fine"]) == [CORRECT, CORRECT]


@pytest.mark.parametrize("victim", ["grading process", "keeper"])
def test_an_innocent_answer_of_a_killed_worker_gets_its_true_verdict(pool: GraderPool, tmp_path: Path, victim: str):
    tickets = [pool.submit(f"wait {tmp_path / 'pids'}", ""), *(pool.submit("fine", "") for _ in range(5))]
    (pid,) = pids(tmp_path / "pids", 1)
    os.kill(pid if victim == "grading process" else worker(pool).keeper.pid, signal.SIGKILL)
    grades = pool.wait(tickets)
    assert [grade.status for grade in grades.values()] == [CORRECT] * 6
    assert [grade.regraded for grade in grades.values()] == [True] + [False] * 5


def test_an_answer_that_kills_its_worker_twice_is_a_crash(pool: GraderPool, tmp_path: Path):
    tickets = [pool.submit(f"die {tmp_path / 'pids'}", ""), pool.submit("fine", "")]
    grades = pool.wait(tickets)
    assert [grade.status for grade in grades.values()] == [CRASH, CORRECT]
    assert grades[tickets[0]].regraded and len(pids(tmp_path / "pids", 2)) == 2


def test_idle_workers_that_are_killed_cost_no_answer(pool: GraderPool):
    for _ in range(4):
        os.kill(worker(pool).pid, signal.SIGKILL)
        assert only(pool, "fine").status is CORRECT


def test_an_answer_of_a_stopped_worker_gets_its_true_verdict(tmp_path: Path):
    with GraderPool(1, 3.0, "hostile_graders:misbehave") as pool:
        pool.wait_ready()
        ticket = pool.submit(f"wait {tmp_path / 'pids'}", "")
        (pid,) = pids(tmp_path / "pids", 1)
        os.kill(pid, signal.SIGSTOP)
        grade = pool.wait([ticket])[ticket]
        assert grade.status is CORRECT and grade.regraded and not alive(pid)


def test_time_in_which_the_whole_job_was_suspended_does_not_count(tmp_path: Path):
    with GraderPool(1, 4.0, "hostile_graders:misbehave") as pool:
        pool.wait_ready()
        ticket = pool.submit(f"wait {tmp_path / 'pids'}", "")
        (pid,) = pids(tmp_path / "pids", 1)
        os.kill(pid, signal.SIGSTOP)
        time.sleep(4.5)  # nobody looks at the pool meanwhile, as if this process had been stopped too
        (tmp_path / "pids.go").touch()
        os.kill(pid, signal.SIGCONT)
        grade = pool.wait([ticket])[ticket]
        assert grade.status is CORRECT and not grade.regraded


@pytest.mark.parametrize("end", ["hang", "die", "close"])
def test_what_a_grader_started_ends_with_it(tmp_path: Path, end: str):
    with GraderPool(1, 3.0 if end == "hang" else DEADLINE_S, "hostile_graders:misbehave") as pool:
        grade = only(pool, f"children-{end} {tmp_path / 'pids'}")
        assert grade.status is {"hang": TIMEOUT, "die": CRASH, "close": CORRECT}[end]
        started = pids(tmp_path / "pids", 8 if end == "die" else 4)
        assert end != "close" or all(map(alive, started))
        if end == "close":
            pool.close()
    assert not any(map(alive, started))


@pytest.mark.parametrize("victim", ["trainer", "keeper"])
def test_what_a_grader_started_ends_with_a_killed_trainer(tmp_path: Path, victim: str):
    code = (
        "import sys, time\nfrom lens_megatron.reward import GraderPool\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "pool = GraderPool(1, 60.0, 'hostile_graders:misbehave'); pool.wait_ready()\n"
        f"pool.submit('children-hang {tmp_path / 'pids'}', '')\n"
        "print(pool._processes[0].keeper.pid, flush=True)\n"
        "while True: pool.poll(); time.sleep(0.05)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], env=environment(), stdout=subprocess.PIPE, text=True)
    keeper = int(parent.stdout.readline())
    started = pids(tmp_path / "pids", 4)
    if victim == "keeper":
        os.kill(keeper, signal.SIGKILL)
        # What has left the process group is out of reach; a second attempt has begun meanwhile.
        until(lambda: not any(map(alive, [started[0], started[1], started[3]])), "the end of the process group")
        os.kill(started[2], signal.SIGKILL)
        started = pids(tmp_path / "pids", 8)
    parent.kill()
    parent.wait()
    until(lambda: not any(map(alive, [*started, keeper])), "the end of all processes")


@pytest.mark.parametrize("completion", ["flood", "come-back-twice"])
def test_a_grader_cannot_disturb_the_frames(pool: GraderPool, completion: str):
    tickets = [pool.submit(word, "") for word in (completion, "exit", "fine", "fine")]
    grades = list(pool.wait(tickets).values())
    assert [grade.status for grade in grades] == [CORRECT, CRASH, CORRECT, CORRECT]
    assert grades[1].detail == "SystemExit: enough" and not any(grade.regraded for grade in grades)


def test_waiting_costs_no_time_of_the_processor(tmp_path: Path):
    with GraderPool(2, 3.0, "hostile_graders:misbehave") as pool:
        pool.wait_ready()
        time.sleep(3.5)  # the second worker has been idle for longer than the limit of an answer
        ticket, before = pool.submit("hang", ""), time.process_time()
        assert pool.wait([ticket])[ticket].status is TIMEOUT
        assert time.process_time() - before < 0.5


@pytest.mark.parametrize(
    ("returned", "named"),
    [("nan", "nan"), ("inf", "inf"), ("-inf", "-inf"), ("1e300", "1e+300"), ("huge", "10000"), ("None", "None"),
     ("'1'", "'1'"), ("list", "[1.0, 2.0]"), ("[]", "[]"), ("1j", "1j"), ("{}", "{}"), ("{'score': nan}", "nan"),
     ("{'score': None}", "None"), ("{'score': 1, 'acc': nan}", "nan")],
)  # fmt: skip
def test_what_is_no_finite_number_is_a_crash_that_names_it(
    values: tuple[GraderPool, GraderPool], returned: str, named: str
):
    for found in (only(values[0], returned), only(values[1], f"[{returned}]")):
        assert found.status is CRASH and found.score == 0.0
        assert "the grader returned" in found.detail and named in found.detail


@pytest.fixture(scope="module")
def values() -> Iterator[tuple[GraderPool, GraderPool]]:
    """One with verl's signature, one with TRL's."""
    sys.path.insert(0, str(Path(__file__).parent))
    with GraderPool(1, DEADLINE_S, "hostile_graders:value") as verl:
        with GraderPool(1, DEADLINE_S, "hostile_graders:values") as trl:
            sys.path.pop(0)
            yield verl, trl


def test_numbers_of_every_kind_are_scores(values: tuple[GraderPool, GraderPool]):
    for returned, score, status in (
        ("True", 1.0, CORRECT),
        ("numpy", 0.5, WRONG),
        ("-3", -3.0, WRONG),
        ("{'score': numpy, 'acc': True}", 0.5, CORRECT),
    ):
        for found in (only(values[0], returned), only(values[1], f"[{returned}]")):
            assert (found.score, found.status) == (score, status)


def test_equal_answers_are_graded_once():
    with GraderPool(2, DEADLINE_S) as pool:
        tickets = [pool.submit(rf"{n}: \boxed{{\frac{{2}}{{4}}}}", "1/2") for n in range(20)]
        grades = pool.wait(tickets)
        again, other = pool.submit(r"\boxed{\frac{2}{4}}.", "1/2"), pool.submit(r"\boxed{\frac{2}{4}}", "1/3")
        grades |= pool.wait([again, other])
    assert grades[again].correct and all(grades[ticket] is grades[again] for ticket in tickets)
    assert grades[other].status is WRONG


def test_thousands_of_queued_answers_are_all_graded():
    completions = [rf"\boxed{{{n % 4000}}}" for n in range(10_000)]
    grades = grade(completions, [str(n % 3999) for n in range(10_000)], DEADLINE_S, workers=2)
    assert [grade.correct for grade in grades] == [n % 4000 == n % 3999 for n in range(10_000)]


def test_a_pool_closed_in_the_middle_lets_its_waiter_go(pool: GraderPool, tmp_path: Path):
    def sample() -> None:
        try:
            only(pool, f"children-hang {tmp_path / 'pids'}")
        except RuntimeError as error:
            raised.append(str(error))

    raised: list[str] = []
    thread = threading.Thread(target=sample)
    thread.start()
    started = pids(tmp_path / "pids", 4)
    pool.close()
    thread.join(DEADLINE_S)
    assert raised == ["the pool is closed"] and not any(map(alive, started))


def test_two_threads_share_a_pool(pool: GraderPool, tmp_path: Path):
    slow = threading.Thread(target=only, args=(pool, f"wait {tmp_path / 'pids'}"))
    slow.start()
    pids(tmp_path / "pids", 1)
    ticket = pool.submit("fine", "")
    (tmp_path / "pids.go").touch()
    assert pool.wait([ticket])[ticket].status is CORRECT
    slow.join(DEADLINE_S)
    assert not slow.is_alive()

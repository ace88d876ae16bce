"""Faults at random on whole runs, one a round: python tests/faults/campaign.py --rounds 200 --log campaign.jsonl

A round starts the run's command, waits for a random time, does one fault to it, and waits for its end. The next round
goes on from there; a run that has done all its steps is compared with one that nothing happened to, and a new one is
begun. After every round: no checkpoint is lost or damaged, no process of the run is left, nor its temporary files and
shared memory; the exit status is one that the fault may lead to, and a rank that ends by itself has said why.
"""

import argparse
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "trainer"))

import psutil
import torch
from toy_runs import ROOT, Toy, checkpoint_tensors, command, environment, make_toy
from tqdm import tqdm

sys.path.insert(0, str(ROOT))

from lens_megatron.output.metrics import read_metrics
from lens_megatron.policy import checkpoint_files

RANKS, STEPS = 2, 12
MARK = "LENS_CAMPAIGN"
END_S = 150.0
"""How long a run may take to end after a fault, or its processes after torchrun's end."""
DISK_MIB = 96


@dataclass(slots=True)
class Round:
    """What was done, and what was seen."""

    number: int
    fault: str
    target: str = ""
    after_s: float = 0.0
    landed: bool = False
    """The run was there when the fault came."""
    status: int | None = None
    rank_status: list[str] = field(default_factory=list)
    steps_before: int = 0
    steps_after: int = 0
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Job:
    """The processes of one launch, found by a variable in their environment."""

    process: subprocess.Popen
    mark: str
    folder: Path

    def processes(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.pid != os.getpid() and process.environ().get(MARK) == self.mark:
                    if process.status() != psutil.STATUS_ZOMBIE:
                        found.append(process)
        return found

    def kind(self, process: psutil.Process) -> str:
        with suppress(psutil.Error):
            words = " ".join(process.cmdline())
            if process.pid == self.process.pid:
                return "torchrun"
            return "grader" if "reward.keeper" in words else "rank" if "pretrain_lens" in words else "other"
        return "gone"


Fault = Callable[[Job, random.Random, Round], None]


def _pick(job: Job, rng: random.Random, result: Round) -> psutil.Process | None:
    """One of the job's processes: torchrun, a rank or a grader, each kind as likely."""
    found: dict[str, list[psutil.Process]] = {}
    for process in job.processes():
        found.setdefault(job.kind(process), []).append(process)
    kinds = sorted(found.keys() & {"torchrun", "rank", "grader"})
    if not kinds:
        return None
    result.landed, result.target = True, rng.choice(kinds)
    return rng.choice(sorted(found[result.target], key=lambda process: process.pid))


def _send(number: int) -> Fault:
    def fault(job: Job, rng: random.Random, result: Round) -> None:
        process = _pick(job, rng, result)
        if process is not None:
            with suppress(psutil.Error):
                process.send_signal(number)

    return fault


def stop_one(job: Job, rng: random.Random, result: Round) -> None:
    """Stops one process for a few seconds, after which it goes on."""
    process = _pick(job, rng, result)
    if process is not None:
        with suppress(psutil.Error):
            process.suspend()
            time.sleep(rng.uniform(0.5, 8))
            process.resume()


def suspend_all(job: Job, rng: random.Random, result: Round) -> None:
    processes = job.processes()
    result.landed = bool(processes)
    for act in ("suspend", "resume"):
        for process in processes:
            with suppress(psutil.Error):
                getattr(process, act)()
        time.sleep(rng.uniform(1, 8) if act == "suspend" else 0)


def interrupt_all(job: Job, rng: random.Random, result: Round) -> None:
    """Ctrl-C reaches every process of the terminal's group."""
    result.landed = job.process.poll() is None
    with suppress(ProcessLookupError):
        os.killpg(job.process.pid, signal.SIGINT)


def fill_disk(job: Job, rng: random.Random, result: Round) -> None:
    result.landed = job.process.poll() is None
    filler = job.folder.parent / "filler"
    with suppress(OSError), filler.open("wb", buffering=0) as file:
        while file.write(b"x" * (1 << 16)):
            pass
    time.sleep(rng.uniform(1, 6))
    filler.unlink()


def busy_disk(job: Job, rng: random.Random, result: Round) -> None:
    """Somebody else writes and waits for the disk all the time."""
    result.landed = job.process.poll() is None
    until, place = time.monotonic() + rng.uniform(2, 6), job.folder.parent / "busy"
    with suppress(OSError):
        while time.monotonic() < until:
            with place.open("wb") as file:
                file.write(os.urandom(1 << 20))
                file.flush()
                os.fsync(file.fileno())
    place.unlink(missing_ok=True)


def outsider(job: Job, rng: random.Random, result: Round) -> None:
    """Garbage, silence and half a message on every port that the job listens on."""
    held = []
    for process in job.processes():
        with suppress(psutil.Error):
            for connection in process.net_connections(kind="tcp"):
                if connection.status != psutil.CONN_LISTEN:
                    continue
                result.landed = True
                host = {"::": "::1", "0.0.0.0": "127.0.0.1"}.get(connection.laddr.ip, connection.laddr.ip)
                for text in (rng.randbytes(rng.randrange(1, 4096)), b"", b"\xff" * 16, b"GET / HTTP/1.1\r\n\r\n"):
                    with suppress(OSError):
                        held.append(socket.create_connection((host, connection.laddr.port), timeout=1))
                        held[-1].sendall(text)
    time.sleep(rng.uniform(0.5, 3))
    for connection in held:
        connection.close()


def second_launch(job: Job, rng: random.Random, result: Round) -> None:
    """The same command again, while the first runs: one of the two must be refused."""
    result.landed = job.process.poll() is None
    second = subprocess.Popen(
        job.process.args, env=environment() | {MARK: job.mark}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    said, _ = second.communicate()
    if second.returncode and b"in use by" not in said and b"filled by another launch" not in said:
        result.problems.append(f"the second launch ended with {second.returncode}: {said[-500:]!r}")


def nothing(job: Job, rng: random.Random, result: Round) -> None:
    result.landed = True


FAULTS: dict[str, tuple[Fault, int]] = {
    "kill": (_send(signal.SIGKILL), 6),
    "term": (_send(signal.SIGTERM), 4),
    "hup": (_send(signal.SIGHUP), 1),
    "interrupt": (interrupt_all, 2),
    "stop": (stop_one, 3),
    "suspend": (suspend_all, 2),
    "full disk": (fill_disk, 3),
    "busy disk": (busy_disk, 1),
    "outsider": (outsider, 2),
    "second launch": (second_launch, 1),
    "nothing": (nothing, 1),
}
"""Name -> what is done, and how often in comparison."""
HARMLESS = ("stop", "suspend", "busy disk", "outsider", "nothing")
"""A run ends with 0 all the same."""


class Campaign:
    """`folder` is made smaller than the machine's disk where this process may mount one, so that it can be filled."""

    def __init__(self, toy: Toy, folder: Path, seed: int):
        self.toy, self.folder, self.rng = toy, folder, random.Random(seed)
        self.runs = 0
        self.temporary = folder / "tmp"
        self.temporary.mkdir()
        self.straight = self.run_once(folder / "straight")
        self.shared_memory = set(os.listdir("/dev/shm"))

    def run_once(self, place: Path) -> dict[str, torch.Tensor]:
        """The weights, optimizer and generators of a run that nothing happens to."""
        job = self.start(place)
        job.process.wait()
        assert job.process.returncode == 0, (place / "output.log").read_text()[-3000:]
        return checkpoint_tensors(place / "run", STEPS, RANKS)

    def start(self, place: Path) -> Job:
        tree = self.toy.tree(
            place / "run",
            data={"eval": [str(self.toy.eval)]},
            rollout={"prompts_per_step": 8},
            train={"steps": STEPS, "save_interval": 1, "eval_interval": 4},
        )
        words, mark = command(tree, place, RANKS), f"{os.getpid()}-{self.rng.getrandbits(64):x}"
        with (place / "output.log").open("ab") as log:
            process = subprocess.Popen(
                words, env=environment() | {MARK: mark, "TMPDIR": str(self.temporary)},
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        return Job(process, mark, place / "run")

    def play(self, number: int) -> Round:
        names, weights = list(FAULTS), [weight for _, weight in FAULTS.values()]
        result = Round(number, self.rng.choices(names, weights)[0])
        place, began = self.folder / f"run{self.runs}", time.monotonic()
        log = place / "output.log"
        written = log.stat().st_size if log.exists() else 0
        result.steps_before = newest(place / "run")
        job = self.start(place)
        self._wait(job, result)
        if job.process.poll() is None:
            FAULTS[result.fault][0](job, self.rng, result)
        try:
            result.status = job.process.wait(END_S)
        except subprocess.TimeoutExpired:
            result.problems.append(f"it has not ended {END_S:.0f} s after the fault")
        said = log.read_bytes()[written:].decode(errors="replace")
        self._check(job, result, place, said)
        result.seconds = round(time.monotonic() - began, 1)
        return result

    def _wait(self, job: Job, result: Round) -> None:
        """Waits for a moment of the start, or for a moment after some step; not beyond the run's end."""
        began = time.monotonic()
        if self.rng.random() < 0.3:
            delay = self.rng.uniform(0.2, 8)
        else:
            delay, done = self.rng.uniform(0, 1.5), self.rng.randrange(result.steps_before, STEPS)
            metrics = job.folder / "metrics.jsonl"
            while job.process.poll() is None and not (metrics.exists() and f'"step": {done},' in metrics.read_text()):
                time.sleep(0.02)
        with suppress(subprocess.TimeoutExpired):
            job.process.wait(delay)
        result.after_s = round(time.monotonic() - began, 2)

    def _check(self, job: Job, result: Round, place: Path, said: str) -> None:
        deadline = time.monotonic() + END_S
        while (left := job.processes()) and time.monotonic() < deadline:
            time.sleep(0.2)
        for process in left:
            result.problems.append(f"left over: {job.kind(process)} {process.pid}")
            process.kill()
        result.rank_status = [line.split(":")[1].split()[0] for line in said.splitlines() if "exitcode  :" in line]
        result.problems += statuses(result, said)
        result.steps_after = newest(place / "run")
        if result.steps_after < result.steps_before:
            result.problems.append(
                f"a checkpoint was lost: {result.steps_before} steps before, {result.steps_after} now"
            )
        result.problems += damaged(place / "run")
        # torchrun's own folder of logs is left when torchrun is killed.
        rest = [path for path in self.temporary.iterdir() if not path.name.startswith("torchelastic_")]
        if rest:
            result.problems.append(f"temporary files: {sorted(path.name for path in rest)}")
        if more := set(os.listdir("/dev/shm")) - self.shared_memory:
            result.problems.append(f"shared memory: {sorted(more)}")
        if result.steps_after == STEPS and not result.problems and result.status == 0:
            result.problems += self._compare(place / "run")
        if result.problems:
            shutil.copyfile(place / "output.log", self.folder.parent / f"problem_{result.number}.log")
        if result.steps_after == STEPS or result.problems:
            shutil.rmtree(place)
            self.runs += 1

    def _compare(self, run: Path) -> list[str]:
        found = checkpoint_tensors(run, STEPS, RANKS)
        different = [name for name, tensor in self.straight.items() if not torch.equal(tensor, found[name])]
        steps = [row["step"] for row in read_metrics(run)]
        problems = [f"{len(different)} tensors differ: {different[:3]}"] if different else []
        # Rows may be missing where the disk was full.
        return problems + ([f"metrics of steps {steps}"] if steps != sorted(set(steps)) else [])


def newest(run: Path) -> int:
    return checkpoint_files.steps_saved(run / "checkpoints")


def damaged(run: Path) -> list[str]:
    """Every published checkpoint must be whole."""
    problems = []
    for path in checkpoint_files.published(run / "checkpoints"):
        try:
            checkpoint_files.verify(checkpoint_files.inspect(path))
        except Exception as error:  # whatever it is, the checkpoint is not whole
            problems.append(f"{path.name} is damaged: {error}")
    return problems


def statuses(result: Round, said: str) -> list[str]:
    """What is wrong with how the run ended."""
    if not result.landed or result.fault in HARMLESS or (result.fault != "interrupt" and result.target == "grader"):
        allowed = {0}
    elif result.fault == "second launch":
        allowed = {0, 1}
    elif result.fault == "full disk":
        allowed = {0, 1}
    else:
        allowed = {0, 1, -9, -15, -2, -1}
    problems = [] if result.status in allowed else [f"torchrun ended with {result.status}"]
    if result.fault in ("full disk", "second launch") and set(result.rank_status) - {"2", "-15"}:
        problems.append(f"a rank ended with {result.rank_status}")
    if "2" in result.rank_status and "error: " not in said:
        problems.append("a rank ended with 2 and did not say why")
    if result.fault in ("full disk", "term", "hup", "interrupt") and result.target in ("", "torchrun"):
        own = [part for part in said.split("Traceback (most recent call last)")[1:] if "/lens_megatron/" in part[:4000]]
        problems += [f"a traceback: {own[0][-300:]}"] if own else []
    return problems


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the number of rounds with problems."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log", type=Path, help="one JSON line per round")
    parser.add_argument("--minutes", type=float, default=1e9, help="no round begins later")
    options = parser.parse_args(arguments)
    bad, until = 0, time.monotonic() + 60 * options.minutes
    with tempfile.TemporaryDirectory() as name:
        disk = Path(name) / "disk"
        disk.mkdir()
        words = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "campaign", str(disk)]
        mounted = subprocess.run(words, capture_output=True, check=False).returncode == 0
        if not mounted:
            del FAULTS["full disk"]
        try:
            campaign = Campaign(make_toy(Path(name)), disk, options.seed)
            for number in tqdm(range(options.rounds), unit="round"):
                if time.monotonic() > until:
                    break
                result = campaign.play(number)
                bad += bool(result.problems)
                line = json.dumps(asdict(result))
                if options.log:
                    with options.log.open("a") as file:
                        file.write(line + "\n")
                if result.problems:
                    tqdm.write(line)
        finally:
            if mounted:
                subprocess.run(["umount", "-l", str(disk)], check=False)
    return bad


if __name__ == "__main__":
    sys.exit(min(main(), 100))

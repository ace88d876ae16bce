"""Graders with verl's and TRL's signatures that misbehave as the completion says: a word, and what it needs."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

VALUES = {"nan": float("nan"), "inf": float("inf"), "numpy": np.float32(0.5), "huge": 10**400, "list": [1.0, 2.0]}


def value(data_source: str, solution_str: str, ground_truth: str, extra_info: dict | None = None) -> object:
    """What the completion says in Python."""
    return eval(solution_str, VALUES)


def values(prompts: list, completions: list, answer: list, **columns: object) -> object:
    return eval(completions[0], VALUES)


def misbehave(data_source: str, solution_str: str, ground_truth: str, extra_info: dict | None = None) -> float:
    word, _, argument = solution_str.partition(" ")
    path = Path(argument)
    if word == "hang":
        time.sleep(600)
    elif word == "die":
        note(path, os.getpid())
        os.kill(os.getpid(), signal.SIGKILL)
    elif word == "wait":  # for the second attempt, or for a file
        note(path, os.getpid())
        while len(path.read_text().split()) < 2 and not path.with_suffix(".go").exists():
            time.sleep(0.02)
    elif word.startswith("children"):
        for child in children():
            note(path, child)
        note(path, os.getpid())
        {"children-hang": lambda: time.sleep(600), "children-die": lambda: os._exit(9)}.get(word, lambda: None)()
    elif word == "flood":
        for _ in range(200):
            os.write(1, b"\0\0\0\1" * 20_000)
        subprocess.run(["cat"], check=True)  # reads its standard input to the end
    elif word == "come-back-twice":
        os.fork()
    elif word == "exit":
        sys.exit("enough")
    return 1.0


def note(path: Path, pid: int) -> None:
    with path.open("a") as file:
        file.write(f"{pid}\n")


def children() -> list[int]:
    """A program; a fork, which holds the grader's pipes; a daemon in a session of its own, whose parent has ended."""
    program = subprocess.Popen(["sleep", "600"]).pid
    fork = os.fork()
    if fork == 0:
        time.sleep(600)
    daemon = subprocess.Popen("setsid sleep 600 >/dev/null & echo $!", shell=True, stdout=subprocess.PIPE, text=True)
    return [program, fork, int(daemon.stdout.readline())]

"""Ranks whose torchrun is gone end, also when it went before they could look for it."""

import os
import signal
import subprocess
import sys

import psutil
import pytest
import torch
from toy_runs import environment

from lens_megatron.supervision import parent

RANK = """
import os, signal, sys, time
from lens_megatron.supervision.parent import end_with_launcher
signal.signal(signal.SIGTERM, lambda *_: (print("told to stop", flush=True), os._exit(0)))
end_with_launcher()
time.sleep(float(sys.argv[1]))
print("still there", flush=True)
"""


def test_a_process_with_torch_is_told_from_one_without():
    assert torch.__version__ and parent.runs_torch(psutil.Process())
    child = subprocess.Popen(["sleep", "60"])
    try:
        assert not parent.runs_torch(psutil.Process(child.pid))
    finally:
        child.kill()
        child.wait()


def rank(seconds: str, **variables: str) -> list[str]:
    """What a rank prints whose nearest ancestor without torchrun's variables is a shell."""
    shell = 'env "$1" "$2" -c "$3" "$4"; true'
    words = ["bash", "-c", shell, "bash", *(f"{name}={value}" for name, value in variables.items()), sys.executable]
    result = subprocess.run(
        [*words, RANK, seconds], env=environment(), capture_output=True, text=True, timeout=120, check=True
    )
    return result.stdout.splitlines()


@pytest.mark.skipif("TORCHELASTIC_RUN_ID" in os.environ, reason="under torchrun")
def test_a_rank_that_finds_no_torchrun_above_it_stops():
    assert rank("60", TORCHELASTIC_RUN_ID="none") == ["told to stop"]
    assert rank("3", SOMETHING_ELSE="none") == ["still there"], "no torchrun has started it"


def test_the_process_that_looks_is_not_its_own_launcher(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    before = signal.getsignal(signal.SIGTERM)
    parent.end_with_launcher()
    assert parent.launcher() is None and signal.getsignal(signal.SIGTERM) is before


def test_a_rank_that_was_taken_over_by_the_first_process_stops():
    """The rank's parent ends before the rank looks for it."""
    shell = 'env TORCHELASTIC_RUN_ID=none bash -c \'(sleep 1; exec "$0" -c "$1" 60) &\' "$1" "$2"'
    done = subprocess.run(
        ["bash", "-c", shell, "bash", sys.executable, RANK], env=environment(), capture_output=True, text=True,
        timeout=120, check=True,
    )  # fmt: skip
    assert done.stdout.splitlines() == ["told to stop"]

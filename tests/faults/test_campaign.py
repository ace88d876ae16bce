"""An hour of faults at random: see campaign.py, which also runs by itself."""

from pathlib import Path

import campaign
import pytest


@pytest.mark.slow
def test_two_hundred_rounds_of_faults(tmp_path: Path):
    log = tmp_path / "campaign.jsonl"
    assert campaign.main(["--rounds", "200", "--minutes", "70", "--log", str(log)]) == 0, log.read_text()

"""Samples that move between ranks arrive where the schedule says, once, and to the bit what they were."""

import subprocess
from dataclasses import replace

import pytest
from records import rollout, sample
from toy_runs import ROOT, environment, torchrun

from lens_megatron.batch import redistribute


def test_samples_of_unequal_ranks_arrive_as_they_were():
    """Three ranks, one of which sampled nothing; then nobody has anything."""
    script = str(ROOT / "tests" / "trainer" / "redistribute_run.py")
    result = subprocess.run([*torchrun(3), script], env=environment(), capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr


def test_a_rollout_that_would_be_read_wrong_is_refused():
    with pytest.raises(ValueError, match="rollout: got 1 log_probs for 2 token_ids"):
        redistribute._numbers(sample(replace(rollout(True), log_probs=(-0.5,))))

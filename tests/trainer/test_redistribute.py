"""Samples that move between ranks arrive where the schedule says, once, and to the bit what they were."""

from dataclasses import replace

import pytest
from records import rollout, sample
from toy_runs import ROOT, run_ranks

from lens_megatron.batch import redistribute


def test_samples_of_unequal_ranks_arrive_as_they_were():
    """Three ranks, one of which sampled nothing; then nobody has anything."""
    run_ranks(3, ROOT / "tests" / "trainer" / "redistribute_run.py")


def test_a_rollout_that_would_be_read_wrong_is_refused():
    with pytest.raises(ValueError, match="rollout: got 1 log_probs for 2 token_ids"):
        redistribute._numbers(sample(replace(rollout(True), log_probs=(-0.5,))))

"""Records that move between ranks arrive where they should, once, and to the bit what they were."""

from toy_runs import ROOT, run_ranks


def test_samples_of_unequal_ranks_arrive_as_they_were():
    """Three ranks, one of which sampled nothing; then nobody has anything. Other records too, of every size."""
    run_ranks(3, ROOT / "tests" / "trainer" / "redistribute_run.py")

"""Records that move between ranks arrive where they should, once, and to the bit what they were."""

import subprocess

from toy_runs import ROOT, environment, torchrun


def test_samples_of_unequal_ranks_arrive_as_they_were():
    """Three ranks, one of which sampled nothing; then nobody has anything. Other records too, of every size."""
    script = str(ROOT / "tests" / "trainer" / "redistribute_run.py")
    result = subprocess.run([*torchrun(3), script], env=environment(), capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr

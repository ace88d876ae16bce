"""Every operator on a vocabulary split over 1, 2 and 4 gloo ranks equals itself on the whole vocabulary.

The single-process path has its own oracle elsewhere. NCCL and more ranks are not covered here.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import vocab_parallel_worker
from vocab_parallel_worker import LAYOUTS, run_case

FOUR = pytest.param((4, "reference"), marks=pytest.mark.slow)


@pytest.fixture(scope="module", params=[(1, "reference"), (2, "reference"), FOUR, (2, "triton")])
def ranks_results(request, tmp_path_factory):
    """Starts the ranks once for all layouts: importing torch is what takes the time."""
    (ranks, backend), folder = request.param, tmp_path_factory.mktemp("ranks")
    script = str(Path(vocab_parallel_worker.__file__))
    environment = os.environ | {"LENS_KERNELS_BACKEND": backend, "TRITON_INTERPRET": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)  # pytest's pythonpath does not reach children
    processes = [
        subprocess.Popen([sys.executable, script, str(r), str(ranks), str(folder)], env=environment)
        for r in range(ranks)
    ]
    try:
        assert [p.wait(timeout=120) for p in processes] == [0] * ranks
    finally:
        for p in processes:
            p.kill()
    return ranks, [torch.load(folder / f"rank{r}.pt") for r in range(ranks)]


def test_equals_the_whole_vocabulary(ranks_results):
    ranks, results = ranks_results
    for layout, (_, valid) in LAYOUTS[ranks].items():
        shared, whole = run_case(valid, slice(None), None)
        for name, expected in shared.items():
            for rank in range(ranks):
                where = f"{layout}, rank {rank}: {name}"
                actual = results[rank][layout][0][name]
                torch.testing.assert_close(
                    actual, expected, rtol=1e-6, atol=4e-6, msg=lambda m, where=where: f"{where}\n{m}"
                )
                assert actual.equal(results[0][layout][0][name]), f"{where} differs from rank 0"
        for name, expected in whole.items():
            actual = torch.cat([results[rank][layout][1][name] for rank in range(ranks)])
            # float32 rounds a sum relative to its largest terms, and a BLAS sums in the order that its processor likes.
            atol = 4e-7 * max(10.0, expected.abs().max().item())
            torch.testing.assert_close(
                actual, expected, rtol=1e-5, atol=atol, msg=lambda m, where=f"{layout}: {name}": f"{where}\n{m}"
            )
            assert actual.isfinite().all()
            if "logits" in name and valid is not None:
                assert actual[valid:].eq(0).all()


def test_whole_vocabulary_results_are_finite_and_ignored_rows_zero():
    """Guards the comparison above: a NaN on both sides would pass as equal."""
    shared, _ = run_case(33, slice(None), None)
    for name, value in shared.items():
        assert value.isfinite().all(), name
    assert shared["logprobs"][1] == shared["entropy"][1] == shared["scores"][1] == 0

"""The tiles path as a GPU takes it, at sizes that only a GPU can take: true tiles, chunks and vocabularies.

The same bodies run at small sizes in the interpreter, with products rounded as on a GPU, so that they are known to run.
"""

import math
from typing import NamedTuple

import pytest
import torch
from kernel_oracle import statistics
from lens_kernels import _tiles, linear_policy_loss, linear_token_logprobs
from test_linear import assert_gradients, leaves

NEEDS_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


class Size(NamedTuple):
    """Where a body runs, and on what."""

    device: str
    rows: int
    columns: int  # no multiple of a tile
    width: int
    tile: int
    chunk: int


SMALL = Size("cpu", rows=24, columns=77, width=16, tile=16, chunk=16)
TRUE = Size("cuda", rows=5000, columns=50257, width=256, tile=2048, chunk=4096)
HUGE = Size("cuda", rows=14200, columns=151936, width=16, tile=2048, chunk=14200)  # 2**31 logits in one chunk


@pytest.fixture
def size(request, monkeypatch):
    """A size, on whose device new tensors are made; on a CPU the kernels are interpreted."""
    monkeypatch.setattr(_tiles, "TILE_COLUMNS", request.param.tile)
    if request.param.device == "cpu":
        monkeypatch.setenv("LENS_KERNELS_BACKEND", "triton")
        request.getfixturevalue("nearest_bfloat16")
        request.getfixturevalue("multiplied_as_on_a_gpu")
    with torch.device(request.param.device):
        yield request.param


def sizes(large):
    interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled where there is a GPU")
    small = pytest.param(SMALL, id="interpreted", marks=interpreted)
    return pytest.mark.parametrize("size", [small, pytest.param(large, id="gpu", marks=NEEDS_GPU)], indirect=True)


def make_head(size, dtype):
    """Hidden states and weight [.., width] of logits of about N(0, 4), and ids of which one is ignored."""
    hidden = torch.randn(size.rows, size.width).to(dtype)
    weight = (torch.randn(size.columns, size.width) * 2 / math.sqrt(size.width)).to(dtype)
    ids = torch.randint(0, size.columns, (size.rows,))
    ids[3] = -1
    return hidden, weight, ids


@sizes(TRUE)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("entropy", [0.0, 0.1])
def test_loss_and_gradients_match_float64(size, dtype, softcap, entropy):
    """The default path of half-precision heads; the float64 oracle takes 500 rows at a time."""
    hidden, weight, ids = make_head(size, dtype)
    advantages = torch.randn(size.rows)
    exact = leaves(hidden, weight, double=True)
    wanted = torch.zeros(size.rows, dtype=torch.float64)
    for start in range(0, size.rows, 500):
        part = slice(start, start + 500)
        logprobs, entropies = statistics(exact[0][part] @ exact[1].T, ids[part], logit_softcap=softcap)
        (-(logprobs * advantages[part]) - entropy * entropies).sum().backward()
        wanted[part] = logprobs.detach()
    ours = leaves(hidden, weight)
    terms = {"advantages": advantages, "entropy_weights": entropy or None, "logit_softcap": softcap}
    result = linear_policy_loss(*ours, ids, path="tiles", chunk_rows=size.chunk, **terms)
    result.loss.backward()
    torch.testing.assert_close(result.logprobs.double(), wanted, rtol=1e-5, atol=1e-5)
    assert_gradients(ours, exact, "tiles", as_is=True, passes_again=entropy > 0 or softcap is not None)
    assert ours[0].grad[3].eq(0).all()


@sizes(HUGE)
def test_rows_beyond_2_to_the_31_elements(size):
    """The last rows of one chunk, whose exponentials and slopes lie beyond what 32-bit offsets reach: 8.6 GB."""
    hidden, weight, ids = make_head(size, torch.bfloat16)
    last = leaves(hidden[-3:], weight, double=True)
    expected, _ = statistics(last[0] @ last[1].T, ids[-3:], logit_softcap=5.0)
    expected.sum().backward()
    ours = leaves(hidden)
    result = linear_policy_loss(
        ours[0], weight, ids, advantages=-1.0, logit_softcap=5.0, path="tiles", chunk_rows=size.chunk
    )
    result.loss.backward()
    torch.testing.assert_close(result.logprobs[-3:].double(), expected.detach(), rtol=1e-5, atol=1e-5)
    error = (ours[0].grad[-3:].double() - last[0].grad).norm() / last[0].grad.norm()
    assert error < 3 * 2**-8, f"relative error {error}: two roundings of the logits' gradient and one of the result"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("function", [linear_token_logprobs, linear_policy_loss])
def test_a_forward_alone_takes_a_twentieth_of_the_logits(function):
    """4096 rows of 151,936 float32 logits are 2.5 GB; the forward without a gradient holds one tile, 34 MB."""
    with torch.device("cuda"):
        hidden, weight, ids = make_head(TRUE._replace(rows=4096, columns=151936), torch.bfloat16)
    terms = {} if function is linear_token_logprobs else {"advantages": 1.0}
    with torch.no_grad():
        function(hidden, weight, ids, **terms)  # cuBLAS takes its own memory once
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function(hidden, weight, ids, **terms)
    assert torch.cuda.max_memory_allocated() - before < 0.05 * 4 * len(ids) * len(weight)

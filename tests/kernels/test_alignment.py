"""Rows that begin anywhere in memory: values and gradients against float64, and nothing written beside the rows."""

import itertools
import os

import pytest
import torch
from kernel_oracle import assert_near, assert_rows_near, statistics
from lens_kernels import VocabShard, _dlogits, _statistics, token_logprobs
from lens_kernels._backend import jit, launch, tl
from lens_kernels._kernel_parts import elements_before_boundary
from lens_kernels._rows import empty_with_rows_like, row_layout, rows_begin_at_boundaries, rows_lie_alike
from lens_kernels._vocab_parallel import TokenRows, merge_statistics

VIEWS = {
    "odd columns": ((3, 1101), torch.float32, lambda x: x),
    "8 mod 16 columns": ((3, 1112), torch.bfloat16, lambda x: x),
    "later rows": ((4, 1101), torch.bfloat16, lambda x: x[1:]),
    "first columns cut": ((3, 1104), torch.float32, lambda x: x[:, 3:]),
    "last column cut": ((3, 1104), torch.bfloat16, lambda x: x[:, :-1]),
    "rows shorter than a vector": ((9, 5), torch.bfloat16, lambda x: x[1:]),
    "transposed": ((2, 3, 301), torch.float16, lambda x: x.transpose(0, 1)[..., 1:]),
    "every second row": ((3, 4, 75), torch.bfloat16, lambda x: x[:, ::2, 2:]),
    "columns apart": ((2, 7, 5), torch.float32, lambda x: x.transpose(1, 2)),
}
GRADIENT_TOLERANCE = {torch.float32: 4e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}


@pytest.fixture
def small_blocks(monkeypatch):
    """So that a row of 1100 columns has several blocks: the first, plain ones, the target's and the last."""
    monkeypatch.setattr(_statistics, "WARPS", 1)
    monkeypatch.setattr(_statistics, "UNROLL", 1)
    monkeypatch.setattr(_dlogits, "BLOCK", 256)


@pytest.mark.usefixtures("backend", "small_blocks")
@pytest.mark.parametrize(("name", "inplace"), [(name, i % 2 == 0) for i, name in enumerate(VIEWS)])
def test_rows_that_begin_anywhere(name, inplace):
    shape, dtype, view = VIEWS[name]
    base = (torch.randn(shape) * 3).to(dtype)
    exact = view(base).double().requires_grad_()
    ids = torch.arange(exact.shape[:-1].numel()).view(exact.shape[:-1]) * 331 % exact.shape[-1]
    ids.view(-1)[0], ids.view(-1)[1], ids.view(-1)[-1] = 0, -1, exact.shape[-1] - 1
    expected, entropy = statistics(exact, ids, temperature=0.8)
    (expected.square() + entropy).sum().backward()

    memory = base.clone()
    ours = view(memory).detach().requires_grad_()
    logprobs, our_entropy = token_logprobs(ours, ids, temperature=0.8, return_entropy=True, inplace_backward=inplace)
    assert_near(logprobs, expected.detach())
    assert_near(our_entropy, entropy.detach(), 5e-6)
    (logprobs.square() + our_entropy).sum().backward()
    assert_rows_near(ours.grad, exact.grad, GRADIENT_TOLERANCE[dtype])
    view(memory).copy_(view(base))
    assert memory.equal(base), "memory beside the rows was written"


@pytest.mark.parametrize("name", [name for name in VIEWS if name != "columns apart"])
def test_gradients_are_allocated_so_that_their_rows_lie_as_those_of_the_logits(name):
    shape, dtype, view = VIEWS[name]
    logits = view(torch.zeros(shape, dtype=dtype))
    out = empty_with_rows_like(logits)
    assert rows_lie_alike(logits, out) and row_layout(out) is not None
    assert out.shape == logits.shape and out.dtype == dtype
    assert out.is_contiguous() or not logits.is_contiguous()
    begins = sorted(out[index].data_ptr() for index in itertools.product(*map(range, out.shape[:-1])))
    ends = [*begins[1:], out.untyped_storage().data_ptr() + out.untyped_storage().nbytes()]
    row_bytes = out.shape[-1] * out.element_size()
    assert all(row_bytes <= end - begin < row_bytes + 32 for begin, end in zip(begins, ends, strict=True))


@pytest.mark.usefixtures("backend", "small_blocks")
def test_padding_of_several_blocks():
    """Blocks of nothing but padding, and one that the padding begins in; it is not read, and its gradient is 0."""
    logits, ids = torch.randn(3, 1024), torch.tensor([3, 299, -1])
    exact = logits[:, :300].double().requires_grad_()
    expected, entropy = statistics(exact, ids)
    (expected + entropy).sum().backward()
    ours = logits.clone()
    ours[:, 300:] = torch.nan
    ours.requires_grad_()
    logprobs, our_entropy = token_logprobs(ours, ids, return_entropy=True, valid_vocab_size=300)
    (logprobs + our_entropy).sum().backward()
    assert_near(logprobs, expected.detach())
    assert_near(our_entropy, entropy.detach(), 5e-6)
    assert_rows_near(ours.grad[:, :300], exact.grad, 4e-6)
    assert ours.grad[:, 300:].eq(0).all() and ours.grad[2].eq(0).all()


@jit
def _distance_kernel(x_ptr, out_ptr):
    i = tl.program_id(0)
    tl.store(out_ptr + i, elements_before_boundary(x_ptr + i))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_distance_from_the_next_boundary(dtype):
    """A GPU faults where this is wrong; the interpreter reads 16 bytes from anywhere."""
    device = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
    x, found = torch.zeros(20, dtype=dtype, device=device)[1:], torch.zeros(17, dtype=torch.int32, device=device)
    launch(_distance_kernel, 17, x.device, x, found)
    size = x.element_size()
    assert found.tolist() == [-(x.data_ptr() + i * size) % 16 // size for i in range(17)]


def test_rows_at_boundaries():
    logits = torch.zeros(4, 32, dtype=torch.bfloat16)
    assert rows_begin_at_boundaries(logits) and rows_begin_at_boundaries(logits[1:, 8:-1])
    assert not rows_begin_at_boundaries(logits[:, 1:]) and not rows_begin_at_boundaries(logits.view(8, 16)[:, 4:12])
    assert not rows_begin_at_boundaries(torch.zeros(4, 31, dtype=torch.bfloat16))
    assert rows_lie_alike(logits[:, 9:], logits.new_zeros(4, 40)[:, 1:24])
    assert not rows_lie_alike(logits[:, 9:], logits.new_zeros(4, 40)[:, 2:25])
    assert not rows_lie_alike(logits[:, 9:], logits.new_zeros(4, 41)[:, 1:24])
    assert not rows_lie_alike(logits, logits.float())


@pytest.mark.usefixtures("backend", "small_blocks")
def test_gradient_into_rows_that_lie_otherwise():
    """Element by element: no 16 bytes of the logits and of the gradient begin alike."""
    logits, ids = torch.randn(3, 501), torch.tensor([0, 77, -1])
    rows = TokenRows(ids, None, None, VocabShard(0, 501, 500))
    totals = merge_statistics(_statistics.row_statistics(logits, rows, with_entropy=True), rows)
    upstream, g, e = torch.tensor(0.3), torch.randn(3), torch.randn(3)
    aligned, memory = torch.empty(3, 501), torch.full((3, 511), 9.0)
    out = memory[:, 5:506]
    assert not rows_lie_alike(out, logits)
    _dlogits.write_dlogits(aligned, logits, rows, totals.softmax, 0.3 * g, 0.3 * e)
    _dlogits.write_dlogits(out, logits, rows, totals.softmax, g, e, upstream)
    torch.testing.assert_close(out, aligned)
    assert memory[:, :5].eq(9).all() and memory[:, 506:].eq(9).all()


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.usefixtures("backend", "small_blocks")
def test_gradient_where_the_host_does_not_know_whether_rows_lie_alike(shift, monkeypatch):
    """As under torch.compile: the kernel compares the addresses of each row."""
    monkeypatch.setattr(_dlogits, "_vectors", lambda out, logits: (4, True, False))
    logits, ids = torch.randn(3, 903), torch.tensor([0, 477, -1])
    rows = TokenRows(ids, None, None, VocabShard(0, 903, 903))
    totals = merge_statistics(_statistics.row_statistics(logits, rows, with_entropy=True), rows)
    memory = torch.full((3 * 903 + 8,), 9.0)
    out = memory[4 + shift :][: 3 * 903].view(3, 903)
    assert rows_lie_alike(out, logits) is (shift == 0)
    _dlogits.write_dlogits(out, logits, rows, totals.softmax, torch.ones(3), torch.ones(3))
    expected = torch.empty_like(out)
    ours = rows, totals.softmax, torch.ones(3), torch.ones(3), None
    _dlogits.write_dlogits_reference(expected, logits, *ours)
    torch.testing.assert_close(out, expected)
    assert memory[: 4 + shift].eq(9).all() and memory[4 + shift + 3 * 903 :].eq(9).all()

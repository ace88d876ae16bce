"""The choice of backend, and what only the Triton path has."""

import inspect
import os
import subprocess
import sys

import lens_kernels
import pytest
import torch
from lens_kernels import (
    VocabShard,
    _crpo,
    _dlogits,
    _statistics,
    _tile_gradient,
    _tiles,
    _vocab_parallel,
    token_logprobs,
)
from lens_kernels._chunk import gradient_buffer
from lens_kernels._vocab_parallel import SoftmaxTotals, TokenRows
from torch._dynamo.testing import CompileCounterWithBackend


@pytest.mark.parametrize("module", [_statistics, _vocab_parallel, _crpo, _dlogits, _tiles, _tile_gradient])
def test_every_kernel_stands_beside_a_reference_of_its_arguments(module):
    own = [name for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__]
    references = [name.removesuffix("_reference") for name in own if name.endswith("_reference")]
    kernels = [name.removesuffix("_triton") for name in own if name.endswith("_triton")]
    assert references == kernels and len(kernels) == 1
    reference, launcher = (getattr(module, f"{kernels[0]}_{kind}") for kind in ("reference", "triton"))
    extra = set(inspect.signature(launcher).parameters) - set(inspect.signature(reference).parameters)
    assert extra <= {"split_rows"}  # which only says how to launch


def test_triton_runs_where_it_is_asked_for(monkeypatch):
    """The suite would pass as well if both of its backends were the reference."""
    monkeypatch.setenv("LENS_KERNELS_BACKEND", "triton")
    monkeypatch.setattr(_statistics, "row_statistics_reference", None)
    device = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
    assert token_logprobs(torch.zeros(1, 4, device=device), torch.tensor([2], device=device)).item() < -1


def test_unknown_backend(monkeypatch):
    monkeypatch.setenv("LENS_KERNELS_BACKEND", "cuda")
    with pytest.raises(ValueError, match="LENS_KERNELS_BACKEND: got 'cuda', need reference, triton or auto"):
        token_logprobs(torch.zeros(1, 4), torch.tensor([2]))


def test_triton_on_the_cpu_needs_the_interpreter():
    code = "import torch, lens_kernels\nlens_kernels.token_logprobs(torch.zeros(1, 4), torch.tensor([2]))"
    environment = os.environ | {"LENS_KERNELS_BACKEND": "triton", "PYTHONPATH": os.pathsep.join(sys.path)}
    environment.pop("TRITON_INTERPRET", None)
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    wanted = "LENS_KERNELS_BACKEND: got triton with tensors on the CPU, need TRITON_INTERPRET=1 set before the import"
    assert wanted in result.stderr


def test_the_import_does_not_bring_the_compiler():
    """torch._dynamo takes 1 to 2 seconds to import, which every rank and every worker would pay."""
    is_there = "print('torch._dynamo' in sys.modules)"
    code = f"import sys, torch\n{is_there}\nimport lens_kernels\n{is_there}"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert result.stdout.split() in (["False", "False"], ["True", "True"]), result.stderr


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("columns", [9000, 50])
@pytest.mark.parametrize("with_entropy", [False, True])
def test_gradient_packed_into_the_logits(columns, with_entropy):
    """bfloat16 gradient in the first half of the bytes of float32 logits' rows, over more columns than a block has."""
    logits, ids = torch.randn(4, columns) * 3, torch.tensor([0, columns - 1, -1, 40])
    tau = torch.tensor([1.0, 0.5, 1.0, 2.0])
    rows = TokenRows(ids, tau, None, VocabShard(0, columns, columns - 1))
    logp = torch.log_softmax((logits / tau[:, None])[:, :-1], -1)
    maximum, entropy = logits[:, :-1].amax(1), -(logp * logp.exp()).sum(1)
    log_sum = ((logits[:, :-1] - maximum[:, None]) / tau[:, None]).exp().sum(1).log()
    totals = SoftmaxTotals(maximum, log_sum, entropy)
    g, e = torch.randn(4), torch.randn(4) if with_entropy else None

    apart = torch.empty_like(logits)
    _dlogits.write_dlogits(apart, logits, rows, totals, g, e)
    packed = gradient_buffer(logits, torch.bfloat16)
    assert packed.data_ptr() == logits.data_ptr() and packed.stride() == (2 * columns, 1)
    _dlogits.write_dlogits(packed, logits, rows, totals, g, e)
    torch.testing.assert_close(packed.float(), apart, rtol=2**-7, atol=1e-30)
    assert packed[2].eq(0).all() and packed[:, -1].eq(0).all()


@pytest.mark.parametrize("start", ["logits", "hidden states"])
@pytest.mark.usefixtures("backend")
def test_losses_under_torch_compile(start):
    """Whole graph, no break, and equal results; on the interpreter there is nothing to compile."""
    if os.environ["LENS_KERNELS_BACKEND"] == "triton" and os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("interpreted kernels cannot be traced")

    def step(hidden, weight, ids):
        logits = hidden @ weight.T
        loss = lens_kernels.policy_loss(logits, ids, advantages=1.0, entropy_weights=0.1, old_logprobs=None).loss
        return loss + lens_kernels.token_logprobs(logits, ids, temperature=0.7).sum()

    def from_hidden_states(hidden, weight, ids):
        before = lens_kernels.linear_token_logprobs(hidden, weight, ids)
        kl = {"reference_logprobs": before.detach() - 1, "kl_weights": 0.1, "kl_limit": 0.2}
        loss = lens_kernels.linear_policy_loss(hidden, weight, ids, advantages=1.0, **kl).loss
        return loss + before.sum()

    hidden, weight = torch.randn(6, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True)
    ids = torch.tensor([0, 49, -1, 3, 3, 7])
    step = {"logits": step, "hidden states": from_hidden_states}[start]
    expected = step(hidden, weight, ids)
    wanted = torch.autograd.grad(expected, (hidden, weight))
    backend = "inductor" if hidden.is_cuda else "aot_eager"  # on a CPU inductor takes a minute of C++ compilation
    actual = torch.compile(step, fullgraph=True, backend=backend)(hidden, weight, ids)
    torch.testing.assert_close(actual, expected)
    for mine, theirs in zip(torch.autograd.grad(actual, (hidden, weight)), wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_no_graph_for_every_number_of_rows():
    """The first number of rows has a graph of its own and the others share one, forward and backward."""
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()

    def step(logits, ids, old):
        scores = lens_kernels.interference_scores(logits, ids, reference_logprobs=old)
        loss = lens_kernels.policy_loss(logits, ids, old_logprobs=old, advantages=scores, entropy_weights=0.1).loss
        return loss + lens_kernels.token_logprobs(logits, ids, logit_softcap=30.0).sum()

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for rows in range(3, 23):
        logits, ids = torch.randn(rows, 11, requires_grad=True), torch.randint(-1, 11, (rows,))
        actual, expected = (
            compiled(logits, ids, torch.full((rows,), -2.0)),
            step(logits, ids, torch.full((rows,), -2.0)),
        )
        torch.testing.assert_close(actual, expected)
        gradients = [torch.autograd.grad(loss, logits)[0] for loss in (actual, expected)]
        torch.testing.assert_close(*gradients)
    assert counter.frame_count <= 2


def test_no_graph_for_every_number_of_scores():
    """Words for an error that hold a number of rows would make a graph of each, if they were made without an error."""
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()

    def step(policy, reference, ids, bounds):
        scores = lens_kernels.interference_scores(policy, ids, reference_logits=reference, temperature=0.7)
        return lens_kernels.select_interference_tokens(scores, bounds, ratio=0.5, eligible=ids >= 0)

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for rows in range(3, 23):
        given = torch.randn(rows, 7), torch.randn(rows, 7), torch.randint(-1, 7, (rows,)), torch.tensor([0, 2, rows])
        for actual, expected in zip(compiled(*given), step(*given), strict=True):
            assert actual.equal(expected)
    assert counter.frame_count <= 2


def test_scores_and_selection_under_torch_compile():
    def step(policy, reference, ids, bounds):
        scores = lens_kernels.interference_scores(policy, ids, reference_logits=reference)
        return lens_kernels.select_interference_tokens(scores, bounds, ratio=0.07)

    given = torch.randn(10, 50), torch.randn(10, 50), torch.arange(10), torch.tensor([0, 4, 10])
    for actual, expected in zip(
        torch.compile(step, fullgraph=True, backend="aot_eager")(*given), step(*given), strict=True
    ):
        assert actual.equal(expected)

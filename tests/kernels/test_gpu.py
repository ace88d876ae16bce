"""What only a GPU can show; the other suites run there too (`pytest -m gpu tests/kernels`).

Memory checks: `compute-sanitizer --tool memcheck python -m pytest -m gpu tests/kernels/test_logprobs.py`, and racecheck
for test_backends.py, whose packed gradient overlaps its input.
"""

import pytest
import torch
from lens_kernels import linear_policy_loss, policy_loss, token_logprobs

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def test_more_than_2_to_the_31_elements():
    """The last rows lie beyond what 32-bit offsets reach: 14,200 x 151,936 bfloat16, 4.3 GB and in place."""
    rows, columns = 14200, 151936
    logits = torch.zeros(rows, columns, dtype=torch.bfloat16, device="cuda")
    logits[-3:] = torch.randn(3, columns, device="cuda")
    ids = torch.randint(0, columns, (rows,), device="cuda")
    last = logits[-3:].float().requires_grad_()
    expected = torch.log_softmax(last, -1).gather(1, ids[-3:, None])[:, 0]
    expected.sum().backward()
    ours = logits.requires_grad_() * 1
    logprobs = token_logprobs(ours, ids, inplace_backward=True)
    torch.testing.assert_close(logprobs[-3:], expected.detach(), rtol=1e-5, atol=1e-5)
    logprobs.sum().backward()
    torch.testing.assert_close(logits.grad[-3:].float(), last.grad, rtol=2**-7, atol=1e-6)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("start", ["logits", "chunks", "tiles"])
def test_tensors_of_another_device_than_the_current_one(start):
    """Triton launches on the current device, where the pointers of cuda:1 mean nothing."""
    results = []
    for device in ("cuda:0", "cuda:1"):
        torch.manual_seed(0)
        hidden, weight = torch.randn(8, 64).to(device).requires_grad_(), torch.randn(100, 64).to(device)
        ids = torch.arange(8, device=device)
        terms = {"advantages": 1.0, "entropy_weights": 0.1, "logit_softcap": 20.0}
        if start == "logits":
            result = policy_loss(hidden @ weight.T, ids, **terms)
        else:
            result = linear_policy_loss(hidden, weight, ids, path=start, **terms)
        result.loss.backward()
        assert result.loss.device == hidden.grad.device == torch.device(device)
        results.append([x.cpu() for x in (result.loss, result.logprobs, hidden.grad)])
    assert torch.cuda.current_device() == 0
    for first, second in zip(*results, strict=True):
        torch.testing.assert_close(second, first)


@pytest.mark.parametrize("start", ["logits", "chunks", "tiles"])
def test_cuda_graph(start):
    """Captured once, replayed on new inputs: nothing waits for the host or remembers a value."""
    hidden = torch.randn(64, 32, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(1000, 32, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    ids = torch.randint(0, 1000, (64,), device="cuda")
    old, advantages = torch.randn(64, device="cuda") - 7, torch.randn(64, device="cuda")

    def step():
        arguments = {"old_logprobs": old, "advantages": advantages, "kl_weights": 0.1, "reference_logprobs": old}
        if start == "logits":
            loss = policy_loss(hidden @ weight.T, ids, **arguments).loss
        else:
            loss = linear_policy_loss(hidden, weight, ids, chunk_rows=40, path=start, **arguments).loss
        return loss, *torch.autograd.grad(loss, (hidden, weight))

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        hidden.normal_()
        ids.random_(0, 1000)
        advantages.normal_()
    graph.replay()
    for actual, expected in zip(captured, step(), strict=True):
        torch.testing.assert_close(actual, expected)


def test_nothing_waits_for_the_gpu():
    logits = torch.randn(64, 1000, device="cuda", requires_grad=True)
    ids, row = torch.randint(0, 1000, (64,), device="cuda"), torch.ones(64, device="cuda")
    halves = logits.detach().bfloat16().requires_grad_()
    policy_loss(logits, ids, old_logprobs=row, advantages=row).loss.backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        policy_loss(logits, ids, old_logprobs=row, advantages=row, temperature=row).loss.backward()
        for path in ("chunks", "tiles"):
            terms = {"advantages": row, "entropy_weights": row, "logit_softcap": 20.0, "path": path}
            linear_policy_loss(halves, halves.detach(), ids.remainder(64), **terms).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")

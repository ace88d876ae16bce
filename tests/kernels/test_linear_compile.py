"""The linear functions under torch.compile: whole graphs in bfloat16, few of them, and what stays outside.

The plain PyTorch backend alone is compiled: interpreted kernels cannot be traced, and the operators hide them anyway.
"""

import pytest
import torch
import torch.distributed as dist
from lens_kernels import VocabShard, linear_policy_loss, linear_token_logprobs
from test_linear import make
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode


@pytest.fixture(autouse=True)
def _fresh_compiler(monkeypatch):
    monkeypatch.setenv("LENS_KERNELS_BACKEND", "reference")
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def step(hidden, weight, ids, shard=None, **settings):
    settings |= {"chunk_rows": 4, "shard": shard}
    before, entropy = linear_token_logprobs(hidden, weight, ids, return_entropy=True, **settings)
    terms = {"reference_logprobs": before.detach() - 1, "kl_weights": 0.1, "entropy_weights": 0.1}
    result = linear_policy_loss(hidden, weight, ids, advantages=1.0, **terms, **settings)
    return result.loss - (before + 0.1 * entropy).sum(), result.logprobs


def assert_equal_to_eager(compiled, hidden, weight, ids, **arguments):
    ours, theirs = ([x.detach().clone().requires_grad_() for x in (hidden, weight)] for _ in range(2))
    loss, logprobs = compiled(*ours, ids, **arguments)
    expected, expected_logprobs = step(*theirs, ids, **arguments)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected)
    assert logprobs.equal(expected_logprobs)
    for mine, other in zip(ours, theirs, strict=True):
        # Two gradients are added, of which a compiler need not round each to bfloat16 first.
        atol = 2**-7 * other.grad.abs().max().item() if other.grad.dtype == torch.bfloat16 else 1e-6
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-5, atol=atol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("picks", [False, True])
def test_many_numbers_of_rows_make_two_graphs(dtype, picks):
    """The chunks' loop would be unrolled for each, and given up at the ninth."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for tokens in range(3, 23):
        hidden, weight, _, ids = make(tokens, 20, dtype)
        picked = {"rows": torch.arange(tokens - 1), "temperature": torch.rand(tokens - 1) + 0.5} if picks else {}
        assert_equal_to_eager(compiled, hidden, weight, ids[1:] if picks else ids, **picked)
    assert counter.frame_count <= 2


def targets(counter):
    """The names of all operations in the graphs that a compiler was given, those of nested graphs included."""
    graphs = [module for graph in counter.graphs for module in graph.modules() if hasattr(module, "graph")]
    return {str(node.target) for module in graphs for node in module.graph.nodes}


def test_a_graph_sees_operators_where_a_call_sees_functions():
    """An operator hides the passes from a compiler, and costs a call outside of graphs several times a function's."""
    hidden, weight, _, ids = make(6, 20)
    counter = CompileCounterWithBackend("aot_eager")
    assert_equal_to_eager(torch.compile(step, fullgraph=True, backend=counter), hidden, weight, ids)
    names = targets(counter)
    for operator in ("linear_logprobs", "linear_logprobs_gradient", "linear_loss"):
        assert any(name.startswith(f"lens_kernels.{operator}") for name in names), names
    assert not [name for name in names if "mm" in name.split(".")]
    with Namespaces() as seen:
        loss, _ = step(hidden.requires_grad_(), weight.requires_grad_(), ids)
        loss.backward()
    assert seen.names == {"aten"}


class Namespaces(TorchDispatchMode):
    """Records of which libraries the operators are that are called."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.namespace)
        return func(*args, **(kwargs or {}))


def test_inductor_takes_bfloat16():
    """It cannot lower a product of bfloat16 factors with a float32 result, which it must therefore not see."""
    hidden, weight, _, ids = make(6, 20, torch.bfloat16)
    assert_equal_to_eager(torch.compile(step, fullgraph=True), hidden, weight, ids)


def test_a_process_group_travels_into_the_graph(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        hidden, weight, _, ids = make(6, 20)
        shard = VocabShard.even(20, dist.group.WORLD)
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        assert_equal_to_eager(compiled, hidden, weight, ids, shard=shard)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("what", ["objective", "accumulate_into"])
def test_what_a_graph_cannot_hold_runs_outside(what):
    hidden, weight, _, ids = make(6, 20)
    buffer = torch.zeros_like(weight)

    def train(hidden, weight, ids):
        how = {"accumulate_into": buffer, "advantages": 1.0}
        if what == "objective":
            how = {"objective": lambda logprobs, entropy, part: logprobs.square()}
        return linear_policy_loss(hidden * 1, weight, ids, chunk_rows=4, **how).loss * 2

    ours, theirs = ([x.clone().requires_grad_() for x in (hidden, weight)] for _ in range(2))
    counter = CompileCounterWithBackend("aot_eager")
    torch.compile(train, backend=counter)(*ours, ids).backward()
    added = buffer.clone()
    buffer.zero_()
    train(*theirs, ids).backward()
    assert counter.frame_count >= 1
    torch.testing.assert_close(ours[0].grad, theirs[0].grad)
    torch.testing.assert_close(added, buffer)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(train, fullgraph=True, backend="aot_eager")(*ours, ids)

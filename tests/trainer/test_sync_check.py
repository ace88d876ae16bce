"""A run whose engine computes another model ends at once, and says so; all other tests' runs are those that go on."""

import math
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import yaml
from toy_runs import Toy
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from lens_megatron import train
from lens_megatron.output.metrics import read_metrics
from lens_megatron.phases import sync_check
from lens_megatron.rollout.engine import Completion, Request
from lens_megatron.rollout.local import LocalEngine

Weights = Iterator[tuple[str, torch.Tensor]]


@pytest.fixture(autouse=True)
def signal_handlers() -> Iterator[None]:
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


def swap_layers(engine: LocalEngine, load: Callable, weights: Weights, version: int) -> None:
    swapped = {"model.layers.0.mlp.down_proj.weight", "model.layers.1.mlp.down_proj.weight"}
    load(engine, ((_other(name, swapped), tensor) for name, tensor in weights), version)


def _other(name: str, pair: set[str]) -> str:
    return next(iter(pair - {name})) if name in pair else name


def keep_the_tied_head(engine: LocalEngine, load: Callable, weights: Weights, version: int) -> None:
    before = engine.model.lm_head.weight.clone()
    load(engine, weights, version)
    if version:
        engine.model.lm_head.weight = torch.nn.Parameter(before, requires_grad=False)


def forget_rope_scaling(engine: LocalEngine, load: Callable, weights: Weights, version: int) -> None:
    load(engine, weights, version)
    frequencies = engine.model.model.rotary_emb.inv_freq
    frequencies *= 4


@pytest.fixture(scope="module")
def scaled_llama(toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    tokenizer = AutoTokenizer.from_pretrained(toy.model)
    sizes = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    rope = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
    ends = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer) + 1, rope_parameters=rope, **sizes, **ends))
    for parameter in model.parameters():
        parameter.data *= 4 if parameter.dim() > 1 else 1
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "fault, version", [(swap_layers, 0), (keep_the_tied_head, 1), (forget_rope_scaling, 0), (None, None)]
)
def test_a_run_with_a_broken_engine_ends(
    fault: Callable | None,
    version: int | None,
    toy: Toy,
    scaled_llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
):
    if fault:
        load = LocalEngine.load_weights
        monkeypatch.setattr(
            LocalEngine, "load_weights", lambda engine, weights, version: fault(engine, load, weights, version)
        )
    tree = toy.tree(tmp_path / "run", train={"steps": 2})
    if fault in (forget_rope_scaling, None):
        tree["model"] = {"path": str(scaled_llama)}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    code = train.main(["--config", str(tmp_path / "config.yaml")])
    printed = capsys.readouterr().out
    if fault is None:
        assert code == 0
        assert 0 < read_metrics(tmp_path / "run")[-1]["training/sync_log_prob_diff"] < 1e-4
        return
    assert code == 2
    assert f"error: weights of version {version}: of token" in printed and "the trainer -" in printed


def test_comparison_is_of_the_mean_and_names_the_worst_token():
    completion = Completion(0, (7, 8, 9), (-1.0, -2.0, -3.0), False, 0)
    verdict = sync_check.compare(completion, [-1.0, -2.75, -3.5])
    assert verdict == sync_check.EngineComparison(pytest.approx(1.25 / 3), 1, 8, -2.0, -2.75)
    assert sync_check.compare(completion, [-1.0, -2.0, math.nan]).difference == math.inf


def test_an_engine_that_serves_nothing_or_others_is_not_asked(toy: Toy):
    engine = LocalEngine(str(toy.model), max_running_sequences=2)
    engine.load_weights(((name, tensor) for name, tensor in engine.model.named_parameters()), 0)
    engine.submit([Request(3, (1, 2), 4, 1.0, seed=0)])
    assert sync_check.sample(engine, Request(0, (1,), 2, 1.0, seed=0)) is None
    assert engine.progress().waiting == 1
    engine.cancel([3])
    assert len(sync_check.sample(engine, Request(0, (1,), 2, 1.0, seed=0)).token_ids) in (1, 2)
    engine.max_running_sequences = 0
    assert sync_check.sample(engine, Request(0, (1,), 2, 1.0, seed=0)) is None

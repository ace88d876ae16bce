"""vLLM's CPU build as the engine: beside transformers, and in whole runs. Skipped where it is not installed."""

import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import test_streaming
import torch
from toy_runs import Toy, launch, rollout_rows
from transformers import AutoModelForCausalLM
from vllm_models import LONG, SHORT, error_in_log_probs, needs_vllm, other, save, weights

from lens_megatron.config import ConfigError, from_tree
from lens_megatron.policy import platform
from lens_megatron.policy.hf_weights import read_hf_config
from lens_megatron.policy.parallel import shut_down
from lens_megatron.rollout.engine import Completion, Request, WeightManifestError
from lens_megatron.rollout.local import LocalEngine
from lens_megatron.rollout.vllm import options as vllm_options
from lens_megatron.rollout.vllm.engine import VllmEngine

pytestmark = needs_vllm


@pytest.fixture(scope="module")
def world() -> Iterator[list[VllmEngine]]:
    """Every engine, kept to the end: closing or collecting one ends vLLM's groups for all.

    All are closed before the world is: one that was not would raise when the interpreter exits.
    """
    import vllm  # noqa: F401  (sets environment variables, before a test compares them)

    platform.init_process_group(platform.install())
    engines: list[VllmEngine] = []
    yield engines
    for engine in engines:
        engine.close()
    shut_down()


def make(model: Path, world: list[VllmEngine], **options: object) -> VllmEngine:
    tree = {"run": {"directory": "unused"}, "model": {"path": str(model)}, "data": {"train": "unused"},
            "rollout": {"engine": "vllm", "max_response_length": 32, "max_running_sequences": 64}}  # fmt: skip
    config = from_tree({**tree, **options})
    hf_config = read_hf_config(str(model))
    vllm_options.check(config, hf_config)
    world.append(VllmEngine(config, hf_config))
    return world[-1]


@pytest.fixture(scope="module")
def engine(roomy: Toy, world: list) -> VllmEngine:
    return make(roomy.model, world)


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def pair(request: pytest.FixtureRequest, toy: Toy, world: list, tmp_path_factory) -> tuple:
    """An engine without weights, and two models of its shape."""
    folder = tmp_path_factory.mktemp("pair")
    save(toy, folder, tied=request.param)
    return make(folder, world), *(other(AutoModelForCausalLM.from_pretrained(folder), seed) for seed in (1, 2))


def finish(engine: VllmEngine | LocalEngine, requests: Sequence[Request]) -> dict[int, Completion]:
    engine.wake()
    engine.submit(requests)
    done = {}
    while len(done) < len(requests):
        done |= {completion.request_id: completion for completion in engine.step()}
    return done


def test_after_a_sync_the_engine_is_the_new_model_and_before_it_the_old_one(pair):
    """Tied heads and prompts that the prefix cache holds are where vLLM would keep the old one."""
    engine, first, second = pair
    requests = [
        Request(3 * place + kind, prompt, 24, temperature, 99 + place)
        for place, prompt in enumerate((SHORT, LONG))
        for kind, temperature in enumerate((0.0, 1.0, 0.7))
    ]
    seen = []
    for version, (new, old) in enumerate([(first, second), (second, first), (first, second)]):
        engine.load_weights(iter(weights(new)), version)
        done = finish(engine, requests)
        again = finish(engine, requests)  # from cached keys and values
        for request in requests:
            completion = done[request.request_id]
            assert completion.weight_version == version and again[request.request_id].token_ids == completion.token_ids
            assert error_in_log_probs(new, request, completion) < 3e-5
            assert error_in_log_probs(old, request, completion) > 0.5
            if request.temperature == 0:
                ids = torch.tensor([request.prompt])
                expected = new.generate(ids, max_new_tokens=24, do_sample=False, pad_token_id=0)
                assert tuple(expected[0, len(request.prompt) :].tolist()) == completion.token_ids
        seen.append({number: completion.token_ids for number, completion in done.items()})
    assert seen[0] == seen[2] != seen[1]


def test_sleeping_gives_the_weights_up(pair):
    engine, model, _ = pair
    engine.load_weights(weights(model), 5)
    engine.wake()
    engine.sleep()
    for act in (engine.wake, lambda: engine.submit([Request(1, SHORT, 4, 1.0, 0)])):
        with pytest.raises(RuntimeError, match="no whole set of weights"):
            act()
    engine.load_weights(weights(model), 6)
    with pytest.raises(RuntimeError, match="asleep; wake it first"):  # vLLM would take it, and never serve it
        engine.submit([Request(1, SHORT, 4, 1.0, 0)])
    request = Request(1, LONG, 8, 1.0, 0)
    assert error_in_log_probs(model, request, finish(engine, [request])[1]) < 3e-5


def test_both_engines_sample_from_one_distribution(engine: VllmEngine, roomy: Toy):
    """Not the same tokens: their draws differ. The share of each first token, within five standard errors."""
    model, count = AutoModelForCausalLM.from_pretrained(roomy.model).eval(), 2000
    engine.load_weights(weights(model), 0)
    done = finish(engine, [Request(i, SHORT, 1, 0.7, 1000 + i) for i in range(count)])
    with torch.no_grad():
        expected = (model(torch.tensor([SHORT])).logits[0, -1] / 0.7).softmax(-1)
    found = torch.bincount(torch.tensor([c.token_ids[0] for c in done.values()]), minlength=len(expected)) / count
    assert bool(((found - expected).abs() <= 5 * (expected * (1 - expected) / count).sqrt() + 1 / count).all())


def test_a_completion_is_a_function_of_its_seed(engine: VllmEngine, roomy: Toy):
    engine.load_weights(weights(AutoModelForCausalLM.from_pretrained(roomy.model)), 0)
    requests = [Request(i, SHORT, 16, 1.0, seed=2**62 + i) for i in range(8)]
    together = finish(engine, requests)
    torch.manual_seed(77)
    assert {i: finish(engine, [r])[i].token_ids for i, r in enumerate(requests)} == {
        i: c.token_ids for i, c in together.items()
    }
    assert len({c.token_ids for c in together.values()}) == 8
    assert finish(engine, [replace(requests[0], request_id=50)])[50].token_ids == together[0].token_ids


@pytest.mark.parametrize(("running", "tau"), [(20, 1.0), (80, 0.7)])
def test_all_schedules_make_the_same_groups(engine: VllmEngine, roomy: Toy, running: int, tau: float):
    """Those of the speculative one are the same although it takes second waves back in the middle."""
    engine.load_weights(weights(AutoModelForCausalLM.from_pretrained(roomy.model)), 3)
    engine.wake()
    ends, engine.eos = engine.eos, list(range(10, 20))  # so that lengths differ
    try:
        found = {}
        for schedule in ("sequential", "streamed", "speculative"):
            found[schedule], stats = test_streaming.sample(
                engine, test_streaming.odd, schedule, running=running, tau=tau
            )
            assert (engine.requests, engine.progress().running, engine.progress().waiting) == ({}, 0, 0)
    finally:
        engine.eos = ends
    assert running < 48 or stats.discarded_tokens > 0
    drawn = {schedule: test_streaming.drawn(groups) for schedule, groups in found.items()}
    assert any(g.rescue for g in drawn["sequential"])
    assert drawn["sequential"] == drawn["streamed"] == drawn["speculative"]
    log_probs = [test_streaming.log_probs(groups) for groups in found.values()]
    for other_schedule in log_probs[1:]:
        torch.testing.assert_close(other_schedule, log_probs[0], atol=1e-4, rtol=0)


def test_cancelled_requests_never_come_back(engine: VllmEngine, roomy: Toy):
    """One is running, one waits, one was never there. The others go on as if alone, and tokens are counted once."""
    engine.load_weights(weights(AutoModelForCausalLM.from_pretrained(roomy.model)), 0)
    requests = [Request(i, LONG[i : i + 5], 20, 2.0, 50 + i) for i in range(70)]  # 64 run at once
    alone = finish(engine, requests[1:2])
    before = engine.generated
    engine.submit(requests)
    for _ in range(3):
        engine.step()
    ended, gone = 70 - len(engine.requests), [0, *range(2, 70), 99]
    known = engine.generated
    assert engine.progress().running + engine.progress().waiting == len(engine.requests) == 70 - ended
    tokens = engine.cancel(gone)
    assert tokens == (63 - ended) * 3
    assert engine.generated == known + tokens
    assert (engine.progress().running, engine.progress().waiting) == (1, 0)
    assert engine.cancel(gone) == 0
    done = []
    while engine.requests:
        done += engine.step()
    assert [(c.request_id, c.token_ids) for c in done] == [(1, alone[1].token_ids)]
    assert engine.generated == before + tokens + sum(len(c.token_ids) for c in done)
    assert finish(engine, requests[:1])[0].token_ids, "its number may be used again"


def test_end_tokens_end_and_limits_cut(engine: VllmEngine, roomy: Toy):
    model = AutoModelForCausalLM.from_pretrained(roomy.model).eval()
    engine.load_weights(weights(model), 0)
    (end,) = engine.eos
    done = finish(engine, [Request(i, SHORT, 100, 2.0, i) for i in range(64)])
    ended = [c for c in done.values() if c.finished]
    assert ended and all(c.token_ids[-1] == end and end not in c.token_ids[:-1] for c in ended)
    assert all(len(c.token_ids) == 100 and end not in c.token_ids for c in done.values() if not c.finished)
    assert engine.progress().running == engine.progress().waiting == 0


def test_nothing_of_the_process_is_changed(roomy: Toy, world: list):
    def state() -> list:
        return [torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist(),
                dict(os.environ), [getattr(*place) for place in vllm_options.REPLACED]]  # fmt: skip

    before = state()
    engine = make(roomy.model, world)
    assert state() == before
    stream = weights(AutoModelForCausalLM.from_pretrained(roomy.model))
    before = state()
    engine.load_weights(stream, 0)
    finish(engine, [Request(i, LONG, 8, 1.0, i) for i in range(4)])
    engine.submit([Request(1, LONG, 8, 1.0, 1)])
    engine.step()
    engine.cancel([1])
    engine.sleep()
    assert state() == before
    # Whichever engine came first in this process: vLLM's streams give Megatron's experts no event to wait for.
    assert torch.cuda.Stream.__module__ == torch.cuda.current_stream().__module__ == platform.__name__


def test_requests_that_cannot_be_served_are_refused(engine: VllmEngine, roomy: Toy):
    engine.load_weights(weights(AutoModelForCausalLM.from_pretrained(roomy.model)), 0)
    engine.wake()
    with pytest.raises(ValueError, match="prompt of 200 \\+ max_new_tokens 313 exceeds the engine's max_model_len 512"):
        engine.submit([Request(1, SHORT, 2, 1.0, 0), Request(2, LONG, 313, 1.0, 0)])
    assert engine.progress().waiting == 0, "the whole batch is refused"
    assert len(finish(engine, [Request(2, LONG, 312, 2.0, 3)])) == 1
    with pytest.raises(ValueError, match="token ids must lie in"):
        engine.submit([Request(1, (10**6,), 2, 1.0, 0)])
    engine.submit([Request(1, SHORT, 2, 1.0, 0)])
    with pytest.raises(ValueError, match="request 1 is in flight"):
        engine.submit([Request(1, SHORT, 2, 1.0, 0)])
    with pytest.raises(RuntimeError, match="1 requests in flight"):
        engine.load_weights([], 1)
    while engine.requests:
        engine.step()


def test_weights_that_are_not_exactly_the_models_are_refused(engine: VllmEngine, roomy: Toy):
    good = weights(AutoModelForCausalLM.from_pretrained(roomy.model))
    name, tensor = good[5]
    for stream, message in [
        (good[:5] + good[6:], f"missing {name}"),
        ([*good, ("lm_head.weight", good[0][1])], "unknown lm_head.weight"),
        ([*good, good[5]], f"duplicate {name}"),
        (good[:5] + [(name, tensor[:-1])] + good[6:], f"{name} has shape .*; missing {name}"),
    ]:
        with pytest.raises(WeightManifestError, match=message):
            engine.load_weights(stream, 1)
        with pytest.raises(RuntimeError, match="no whole set of weights"):
            engine.submit([Request(1, SHORT, 2, 1.0, 0)])
    engine.load_weights(good, 2)
    request = Request(1, LONG, 8, 1.0, 0)
    model = AutoModelForCausalLM.from_pretrained(roomy.model).eval()
    assert error_in_log_probs(model, request, finish(engine, [request])[1]) < 3e-5


def test_more_prompt_tokens_than_one_step_takes(engine: VllmEngine, roomy: Toy):
    """vLLM would cut one in two, and on a CPU cannot with a seed."""
    model = AutoModelForCausalLM.from_pretrained(roomy.model).eval()
    engine.load_weights(weights(model), 0)
    requests = [Request(i, tuple((i + 3 * t) % 90 + 3 for t in range(150)), 2, 1.0, i) for i in range(40)]
    done = finish(engine, requests)
    assert max(error_in_log_probs(model, request, done[request.request_id]) for request in requests) < 3e-5


def test_out_of_room_for_keys_and_values_nothing_changes(engine: VllmEngine, roomy: Toy, world: list):
    model = AutoModelForCausalLM.from_pretrained(roomy.model).eval()
    per_block = 2 * 2 * 2 * 32 * 4 * vllm_options.BLOCK  # keys and values, layers, heads, head_dim, bytes
    small = make(roomy.model, world, vllm={"kv_cache_memory_bytes": 6 * per_block})
    requests = [Request(i, LONG[i:], 100, 2.0, i) for i in range(8)]
    found = []
    for each in (engine, small):
        each.load_weights(weights(model), 0)
        found.append({i: completion.token_ids for i, completion in finish(each, requests).items()})
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"vllm": {"max_num_seq": 4}}, "vllm.max_num_seq: vLLM has no such option; did you mean vllm.max_num_seqs"),
        ({"vllm": {"dtype": "float16"}}, "vllm.dtype cannot be set: it is model.dtype; remove it"),
        (
            {"vllm": {"logprobs_mode": "raw_logprobs"}},
            "vllm.logprobs_mode=raw_logprobs: sampled tokens would have other",
        ),
        ({"vllm": {"logprobs_mode": "processed_logprobs"}}, "vllm.logprobs_mode cannot be set"),
        ({"vllm": {"max_model_len": 100}}, r"vllm.max_model_len \(100\) is below data.max_prompt_length \(512\) \+"),
        ({"vllm": {"enable_sleep_mode": True}}, "vllm.enable_sleep_mode: memory of a CPU"),
        ({"vllm": {"enable_chunked_prefill": True}}, "vllm.enable_chunked_prefill: on a CPU it breaks"),
        ({"vllm": {"block_size": "x"}}, r"vllm.block_size \('x'\): expected a whole number from 1"),
        ({"train": {"eval_temperature": 0.001}}, r"train.eval_temperature \(0.001\): vLLM samples at 0.01 and above"),
    ],
)
def test_what_vllm_cannot_do_is_refused_before_the_start(sections: dict, message: str, roomy: Toy, world: list):
    with pytest.raises(ConfigError, match=message):
        make(roomy.model, world, **sections)


def test_heads_that_vllm_has_no_attention_for_are_refused(toy: Toy):
    with pytest.raises(ConfigError, match="no attention for a head_dim of 16, only for 32, 64"):
        make(toy.model, [])


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_program_trains_on_rollouts_of_vllm(roomy: Toy, ranks: int, tmp_path: Path):
    tree = roomy.tree(tmp_path / "run", rollout={"engine": "vllm"}, data={"eval": [str(roomy.eval)]})
    rows = launch(tree, tmp_path, ranks)
    assert [row["training/global_step"] for row in rows[1:]] == [1, 2]
    for step, row in enumerate(rows[1:], 1):
        assert row["actor/ratio_min"] == pytest.approx(1.0, abs=1e-4) and abs(row["actor/ppo_kl"]) < 1e-5
        assert row["actor/grad_norm"] > 0
        assert len(rollout_rows(tmp_path / "run", step)) >= 16
    assert sum(row["lens/purified_prompts"] for row in rows[1:]) > 0

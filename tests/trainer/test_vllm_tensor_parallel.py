"""vLLM engines over two ranks each: the ranks draw the same tokens, which are the model's; and whole runs on them."""

import json
import subprocess
from pathlib import Path

import pytest
import tensor_parallel_run
from toy_runs import Toy, command, environment, rollout_rows, start_ranks
from transformers import AutoModelForCausalLM
from vllm_models import error_in_log_probs, needs_vllm, other, save

from lens_megatron.config import ConfigError, check_world, from_tree
from lens_megatron.config.layout_rules import model_mistakes
from lens_megatron.output.metrics import read_metrics
from lens_megatron.policy.hf_weights import read_hf_config
from lens_megatron.rollout.engine import Completion

pytestmark = needs_vllm


def completions(phase: list[dict]) -> list[Completion]:
    return [Completion(**{**c, "token_ids": tuple(c["token_ids"]), "log_probs": tuple(c["log_probs"])}) for c in phase]


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_the_ranks_of_an_engine_draw_the_same_and_it_is_the_models(ranks: int, toy: Toy, tmp_path: Path):
    paths = [tmp_path / "model", tmp_path / "other"]
    for seed, path in enumerate(paths):
        path.mkdir()
        save(toy, path, tied=True)
        model = other(AutoModelForCausalLM.from_pretrained(path), seed + 1)
        model.save_pretrained(path)
    models = [AutoModelForCausalLM.from_pretrained(path).eval() for path in paths]
    with start_ranks(ranks, Path(tensor_parallel_run.__file__), *paths, tmp_path, finalize=True) as started:
        assert started.wait() == [0] * ranks, started.stdout()[-2000:] + started.stderr()[-4000:]
        assert "Traceback" not in started.stderr(), "closed in order, vLLM leaves nothing that raises at the exit"
    found = [json.loads((tmp_path / f"rank_{rank}.json").read_text()) for rank in range(ranks)]
    assert [(f["engine"], f["leads"], f["engines"]) for f in found] == [
        (r // 2, r % 2 == 0, ranks // 2) for r in range(ranks)
    ]
    for rank, here in enumerate(found):
        assert here["led"] == ([] if rank % 2 else [10 * rank, 10 * rank + 10, 10 * rank + 11])
        assert here["back"] == ([10 * rank, 10 * rank + 1] if rank % 2 else [10 * rank])
        assert here["said"].startswith(f"the 2 ranks of engine {here['engine']} drew different tokens")
        wanted = {request.request_id: request for request in tensor_parallel_run.requests(here["engine"])}
        phases = [completions(phase) for phase in here["phases"]]
        for version, phase in enumerate(phases):
            assert {c.request_id for c in phase} == wanted.keys() - set(tensor_parallel_run.CANCELLED)
            for completion in phase:
                assert completion.weight_version == version
                request = wanted[completion.request_id]
                assert error_in_log_probs(models[version % 2], request, completion) < 3e-5
                assert error_in_log_probs(models[1 - version % 2], request, completion) > 0.5
        tokens = [{c.request_id: c.token_ids for c in phase} for phase in phases]
        assert tokens[0] == tokens[2] != tokens[1]
        leader = [completions(phase) for phase in found[rank // 2 * 2]["phases"]]
        assert [[(c.request_id, c.token_ids) for c in p] for p in phases] == [
            [(c.request_id, c.token_ids) for c in p] for p in leader
        ]


TP2 = {"tensor_model_parallel_size": 2}


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "layout"), [(2, {}), (2, TP2), (4, TP2)])
def test_the_program_trains_on_an_engine_over_two_ranks(ranks: int, layout: dict, roomy: Toy, tmp_path: Path):
    """In the first layout the two ranks of the engine train on different prompts. The trainer's state moves away.

    torchrun starts the ranks: forked ones leave the shared memory of vLLM's groups behind.
    """
    tree = roomy.tree(
        tmp_path / "run", rollout={"engine": "vllm", "offload_trainer": True}, data={"eval": [str(roomy.eval)]},
        vllm={"tensor_parallel_size": 2}, megatron=layout, train={"steps": 2, "eval_interval": 1},
    )  # fmt: skip
    words = command(tree, tmp_path, ranks)
    result = subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-6000:]
    rows = read_metrics(tmp_path / "run")
    assert [row["training/global_step"] for row in rows[1:]] == [1, 2]
    for step, row in enumerate(rows[1:], 1):
        assert row["actor/ratio_min"] == pytest.approx(1.0, abs=1e-4) and abs(row["actor/ppo_kl"]) < 1e-5
        assert row["training/rollout_probs_diff_max"] < 1e-4 and row["actor/grad_norm"] > 0
        assert row["perf/engine_idle_share/max"] < 1, "followers are no engines"
        prompts = [line["prompt_index"] for line in rollout_rows(tmp_path / "run", step)]
        assert len(set(prompts)) == 4
    assert all(name in rows[-1] for name in ("timing_s/wake", "timing_s/sleep"))


def test_models_that_cannot_be_cut_are_refused(roomy: Toy):
    data = {"train": "x", "max_prompt_length": 9}
    tree = {"run": {"directory": "x"}, "model": {"path": str(roomy.model)}, "data": data}
    shape = read_hf_config(str(roomy.model))
    for size, found in (
        (2, []),
        (3, ["num_attention_heads (4); choose a divisor of 4", "(3) neither divides the model's num_key_value_heads"]),
        (8, ["num_attention_heads (4)"]),
        (5, ["num_attention_heads (4)", "intermediate_size (96)", "num_key_value_heads (2)"]),
    ):
        config = from_tree({**tree, "rollout": {"engine": "vllm", "max_response_length": 9},
                            "vllm": {"tensor_parallel_size": size}})  # fmt: skip
        said = list(model_mistakes(config, shape))
        assert len(said) == len(found) and all(part in line for part, line in zip(found, said, strict=True)), said
    with pytest.raises(ConfigError, match=r"vllm.tensor_parallel_size \(4\) does not divide world size \(6\)"):
        check_world(from_tree({**tree, "rollout": {"engine": "vllm"}, "vllm": {"tensor_parallel_size": 4}}), 6)

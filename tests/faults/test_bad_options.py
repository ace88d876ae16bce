"""Values of options that cannot be used are refused, and the plan of a run answers in time for all of them."""

import shutil
from pathlib import Path

import pytest
import yaml
from refusals import HUGE, LONG, VERY_LONG, Accepted, Trainer, limited, odd_files

from lens_megatron.tools import plan


def test_what_is_refused_below_is_accepted_as_it_should_be(trainer: Trainer):
    with pytest.raises(Accepted):
        trainer.refusal()


PATHS = ("run.directory", "model.path", "model.reference_path", "data.train", "debug.save_rollouts",
         "debug.load_rollouts")  # fmt: skip
BAD_PATHS = {
    "''": "expected a path, got an empty text",
    "'  '": "expected a path, got an empty text",
    '"a\\0b"': "NUL byte",
    '"a\\ud800b"': "half a character",
    LONG: "may have 255 bytes, one has 300",
    f"/tmp/{LONG}/{LONG}.jsonl": "may have 255 bytes, one has 306",
    VERY_LONG: "may have 4095 bytes, this one has 5001",
    "~no_such_user/a.jsonl": "no such home folder",
    "[a]": "should be a valid string",
    "{a: b}": "should be a valid string",
    "17": "should be a valid string",
    "TMP/file/below.jsonl": "",
    "TMP/loop.jsonl": "",
    "TMP/fifo.jsonl": "",
    "TMP/zero.jsonl": "",
}


@pytest.mark.parametrize("value", BAD_PATHS, ids=lambda value: value[:30])
@pytest.mark.parametrize("name", PATHS)
def test_paths(trainer: Trainer, name: str, value: str):
    odd_files(trainer.folder)
    message = trainer.refusal(f"{name}={value}")
    assert name in message or value.replace("TMP", "") in message
    assert BAD_PATHS[value] in message


NUMBERS = (
    "run.phase_timeout_minutes=1e300",
    "run.phase_timeout_minutes=1000000",
    "run.phase_timeout_minutes=.nan",
    "run.phase_timeout_minutes=-1",
    "run.seed=-1",
    f"run.seed={HUGE}",
    "run.seed=1.5",
    "reward.timeout_s=1e300",
    "reward.timeout_s=.inf",
    "reward.timeout_s=1e-300",
    "reward.timeout_s=10000000",
    "reward.workers_per_rank=100000",
    "reward.workers_per_rank=0",
    f"reward.workers_per_rank={HUGE}",
    "rollout.temperature=1e-300",
    "rollout.temperature=1e300",
    "rollout.temperature=.nan",
    "rollout.temperature=-1",
    "rollout.rollouts_per_prompt=2000000000",
    f"rollout.rollouts_per_prompt={HUGE}",
    f"rollout.prompts_per_step={HUGE}",
    f"rollout.max_response_length={HUGE}",
    "rollout.max_response_length=1000",
    f"rollout.max_running_sequences={HUGE}",
    "rollout.max_running_sequences=2000000000",
    "rollout.servers=100000",
    f"rollout.servers={HUGE}",
    "rollout.servers=[]",
    "rollout.servers=['http://a:99999']",
    "rollout.servers=['http://a:0']",
    "rollout.servers=['http://user@a:80']",
    "rollout.servers=[1]",
    "data.max_prompt_length=-1",
    f"data.max_prompt_length={HUGE}",
    "lens.tau=.nan",
    "lens.deletion_ratio=1e-300",
    "lens.min_score=1e300",
    "lens.min_score=-.inf",
    f"lens.min_keep_failures={HUGE}",
    "algorithm.advantage_eps=1e-300",
    "algorithm.advantage_eps=1e300",
    "algorithm.clip_high=1e300",
    "algorithm.dual_clip=1e300",
    "algorithm.kl_coef=1e300",
    "algorithm.entropy_coef=.inf",
    "algorithm.imitation_coef=1e39",
    "algorithm.correction_high=1e300",
    "optimizer.lr=1e300",
    "optimizer.lr=1e-300",
    f"optimizer.lr={HUGE}",
    "optimizer.lr=yes",
    "optimizer.adam_eps=1e-300",
    "optimizer.weight_decay=1e300",
    f"optimizer.lr_warmup_steps={HUGE}",
    "optimizer.clip_grad=1e300",
    f"train.steps={HUGE}",
    "train.steps=-1",
    "train.steps=[1]",
    f"train.max_tokens_per_micro_batch={HUGE}",
    f"train.updates_per_batch={HUGE}",
    f"train.eval_interval={HUGE}",
    "train.eval_samples=2000000000",
    "train.eval_temperature=1e-300",
    "train.eval_temperature=1e300",
    f"train.save_interval={HUGE}",
    f"train.save_total_limit={HUGE}",
    f"train.save_best_limit={HUGE}",
    f"train.max_skipped_updates={HUGE}",
    "megatron.tensor_model_parallel_size=1000",
    f"megatron.tensor_model_parallel_size={HUGE}",
    "megatron.pipeline_model_parallel_size=1000",
    "megatron.virtual_pipeline_model_parallel_size=7",
    f"megatron.virtual_pipeline_model_parallel_size={HUGE}",
    "megatron.context_parallel_size=1000",
    "megatron.expert_model_parallel_size=1000",
    "megatron.expert_tensor_parallel_size=1000",
    "vllm.tensor_parallel_size=-1",
    f"vllm.tensor_parallel_size={HUGE}",
    "vllm.gpu_memory_utilization=1e-300",
    f"cluster.nodes={HUGE}",
    "cluster.gpus_per_node=2000000000",
    "cluster.gpu_memory_gib=1e300",
    "cluster.host_memory_gib=.nan",
    "cluster.network_gb_s=1e-300",
)


@pytest.mark.parametrize("override", NUMBERS, ids=lambda text: text[:50])
def test_numbers(trainer: Trainer, override: str):
    name = override.partition("=")[0].rpartition(".")[2]
    assert name in trainer.refusal(override)


OTHERS = {
    "data.eval=['']": "data.eval.0",
    "data.eval=['', 3, null]": "data.eval.1",
    f"data.eval=[{LONG}]": "255 bytes",
    "data.eval=[TMP]": "is a folder",
    "data.train=json": "json:train: cannot be loaded as a Hugging Face dataset",
    "data.train=no/such-dataset": "cannot be loaded as a Hugging Face dataset",
    "data.train='no/such-dataset:train[:9%'": "cannot be loaded as a Hugging Face dataset",
    "data.problem_key=answer": "both problem and answer",
    "data.instruction=[a]": "data.instruction",
    'data.instruction="\\ud800"': "cannot be saved",
    'data.system_prompt="\\udfff"': "cannot be saved",
    f"data.{LONG * 100}=1": "unknown option data.nnn",
    "megatron.transformer=[1]": "megatron.transformer",
    "megatron.ddp={overlap_param_gather: true}": "overlap_param_gather",
    "megatron.transformer={no_such_field: 1}": "no_such_field",
    "megatron.transformer={num_layers: 7}": "num_layers",
    "megatron.transformer={hidden_size: 0}": "hidden_size",
    "megatron.transformer={hidden_dropout: no number}": "hidden_dropout",
    "megatron.transformer={recompute_granularity: most}": "recompute_granularity",
    "megatron.ddp={no_such_field: 1}": "no_such_field",
    "megatron.ddp={bucket_size: many}": "bucket_size",
    "megatron.optimizer={no_such_field: 1}": "no_such_field",
    "megatron.optimizer={loss_scale: much}": "loss_scale",
    "debug={save_rollouts: TMP/r, load_rollouts: TMP/../TMPNAME/r}": "",
    "train.metric_for_best_model=''": "no metric ''",
    "lens={tau: 0.1, tau: 0.2}": "'tau' stands 2 times",
    "run={directory: TMP/run, directory: TMP}": "'directory' stands 2 times",
    "data.train=TMP/file.jsonl.gz": "no such file",
    "model.path=TMP/file": "no config.json there",
    "model.reference_path=/nowhere": "no config.json there",
    "debug.save_rollouts=/dev/null/a": "/dev/null is a file",
    "debug.save_rollouts=/dev/null": "/dev/null is a file",
    "run.directory=/dev/null/a": "/dev/null",
    "megatron.optimizer={weight_decay: .inf}": "expected a finite number",
    "megatron.transformer={tensor_model_parallel_size: 2}": "set that",
    "megatron.transformer={init_method: xavier}": "init_method",
    "megatron.transformer={recompute_num_layers: '1'}": "write 1 without quotation marks",
    "megatron.transformer={recompute_num_layers: 1.0}": "write 1",
    "x" * 3_000: "expected section.option=value",
    "a." * 3_000 + "a=1": "unknown option",
    "lens=" + "[" * 5_000: "nested too deeply",
    "lens.tau=" + "{a: " * 200 + "1" + "}" * 200: "levels below each other",
}


@pytest.mark.parametrize("override", OTHERS, ids=lambda text: text[:50])
def test_other_options(trainer: Trainer, override: str):
    assert OTHERS[override] in trainer.refusal(override.replace("TMPNAME", trainer.folder.name))


def test_a_tilde_is_the_home_folder_in_every_path(trainer: Trainer, monkeypatch: pytest.MonkeyPatch):
    from lens_megatron import config as configuration

    monkeypatch.setenv("HOME", str(trainer.folder))
    tree = trainer.toy.tree(trainer.folder / "run", data={"eval": ["~/e.jsonl"]})
    found = configuration.from_tree(tree | {"debug": {"save_rollouts": "~/s", "load_rollouts": "~/l"}})
    home = str(trainer.folder)
    assert (found.data.eval, found.debug.save_rollouts) == ((f"{home}/e.jsonl",), f"{home}/s")
    assert found.debug.load_rollouts == f"{home}/l"
    shutil.copytree(trainer.toy.model, trainer.folder / "m")
    shutil.copy(trainer.toy.train, trainer.folder / "t.jsonl")
    overrides = ("run.directory=~/run", "model.path=~/m", "model.reference_path=~/m", "data.train=~/t.jsonl")
    with pytest.raises(Accepted):
        trainer.refusal(*overrides)
    demo = configuration.load(Path(__file__).parents[2] / "configs" / "demo.yaml")
    assert demo.model.path == f"{home}/.cache/lens_megatron/demo/model"


@pytest.mark.parametrize("override", [*NUMBERS, *OTHERS, *(f"{n}={v}" for n in PATHS[:4] for v in BAD_PATHS)],
                         ids=lambda text: text[:50])  # fmt: skip
def test_the_plan_of_what_cannot_run(trainer: Trainer, override: str):
    """The plan may say yes to what only the trainer can judge, but says it in time, and without a traceback."""
    odd_files(trainer.folder)
    path = trainer.folder / "config.yaml"
    path.write_text(yaml.safe_dump(trainer.toy.tree(trainer.folder / "run")))
    with limited():
        status = plan.main([str(path), override.replace("TMP", str(trainer.folder))])
    printed = trainer.capsys.readouterr()
    assert status in (0, 2) and (status == 0 or printed.err.startswith("error: "))

"""The trainer's state goes to host memory and comes back the same: on CPU tensors, by the code that a GPU runs."""

from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from checkpoint_policy import config, exported, train_step
from test_policy import add_tokenizer, saved_model

from lens_megatron.config import Config, ConfigError, from_tree
from lens_megatron.data.prompts import PromptStream
from lens_megatron.phases import engine_turn
from lens_megatron.policy.forward import prompt_scores
from lens_megatron.policy.model import Policy, build_policy
from lens_megatron.policy.offload import TrainerMemory, is_enabled
from lens_megatron.policy.parallel import Mesh
from lens_megatron.policy.sharded_state import optimizers
from lens_megatron.rollout.engine import Completion, Request
from lens_megatron.rollout.local import LocalEngine
from lens_megatron.rollout.vllm.tensor_parallel import build_engine_group
from lens_megatron.run import Run
from lens_megatron.supervision.clock import Clock
from lens_megatron.types import Prompt

STEPS = 3


def tree(**sections: object) -> dict:
    return {"run": {"directory": "unused"}, "model": {"path": "unused"}, "data": {"train": "unused"}, **sections}


@pytest.fixture(params=["plain", "distributed_optimizer"])
def distributed(request: pytest.FixtureRequest) -> bool:
    return request.param == "distributed_optimizer"


@pytest.fixture(params=["float32", "bfloat16"])
def built(request: pytest.FixtureRequest, distributed: bool, mesh: Mesh, tmp_path: Path) -> Config:
    saved_model("qwen3_moe", True, tmp_path / "model")
    return config(tmp_path, {"use_distributed_optimizer": distributed}, request.param)


def tensors(policy: Policy) -> dict[str, torch.Tensor]:
    """What the device holds for training, gradients aside, to be compared bit for bit."""
    found = {name: parameter.data for name, parameter in policy.models()[0].named_parameters()}
    for number, optimizer in enumerate(optimizers(policy)):
        parameters = [p for group in optimizer.optimizer.param_groups for p in group["params"]]
        for place, parameter in enumerate(parameters):
            found[f"main/{number}/{place}"] = parameter.data
            state = optimizer.optimizer.state[parameter]
            found |= {f"{name}/{number}/{place}": value for name, value in state.items() if torch.is_tensor(value)}
    return found


def gradients(policy: Policy) -> list[torch.Tensor]:
    return [parameter.main_grad for chunk in policy.chunks for parameter in chunk.parameters()]


def test_away_it_holds_nothing_and_back_it_is_the_same(built: Config, mesh: Mesh):
    policy = build_policy(built, mesh)
    memory = TrainerMemory(policy, enabled=True)
    for step in range(STEPS):
        if step:
            train_step(policy, built.algorithm)  # the optimizer's moments exist from here on
        before = {name: tensor.clone() for name, tensor in tensors(policy).items()}
        held = {t.untyped_storage()._cdata: t.untyped_storage().nbytes()
                for t in (*tensors(policy).values(), *gradients(policy))}  # fmt: skip
        assert memory.to_host() == sum(held.values()) and memory.is_away and memory.to_host() == 0
        assert {t.untyped_storage().nbytes() for t in (*tensors(policy).values(), *gradients(policy))} == {0}
        memory.to_device()
        assert not memory.is_away
        after = tensors(policy)
        assert after.keys() == before.keys()
        assert all(torch.equal(after[name], before[name]) for name in before)
        assert not any(gradient.any() for gradient in gradients(policy))
        for chunk in policy.chunks:
            for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers):
                for parameter in buffer.params:
                    assert parameter.main_grad.untyped_storage()._cdata == buffer.grad_data.untyped_storage()._cdata
                    if buffer.param_data is not None:
                        assert parameter.untyped_storage()._cdata == buffer.param_data.untyped_storage()._cdata
    assert len(before) > 3 * len(list(policy.models()[0].parameters()))


def test_training_goes_on_as_if_nothing_had_moved(built: Config, mesh: Mesh):
    def trained(enabled: bool) -> tuple[list[float], dict[str, torch.Tensor]]:
        policy, losses = build_policy(built, mesh), []
        memory = TrainerMemory(policy, enabled=enabled)
        for _ in range(STEPS):
            assert (memory.to_host() > 0) == enabled
            memory.to_device()
            losses.append(train_step(policy, built.algorithm))
        return losses, exported(policy)

    (losses, weights), (expected_losses, expected) = trained(True), trained(False)
    assert losses == expected_losses and len(set(losses)) == STEPS
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_scores_against_the_reference_are_the_same_afterwards(mesh: Mesh, tmp_path: Path):
    saved_model("qwen3", True, tmp_path / "model")
    saved_model("qwen3", True, tmp_path / "reference", seed=1)
    paths = {"path": str(tmp_path / "model"), "reference_path": str(tmp_path / "reference")}
    policy = build_policy(from_tree(tree(model=paths, rollout={"max_response_length": 8})), mesh)
    prompts = [(3, 9, 27, 81), (5, 25)]
    before = prompt_scores(policy, prompts, max_tokens=64)
    memory = TrainerMemory(policy, enabled=True)
    memory.to_host()
    memory.to_device()
    assert all(map(torch.equal, prompt_scores(policy, prompts, max_tokens=64), before))


class Engine(LocalEngine):
    """Writes down what it is told, and loses its weights asleep, as vLLM does."""

    log: list[str]
    memory: TrainerMemory

    def _note(self, what: str) -> None:
        self.log.append(f"{what}, trainer {'away' if self.memory.is_away else 'here'}")

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        self._note("load")
        super().load_weights(weights, version)

    def wake(self) -> None:
        self._note("wake")

    def sleep(self) -> None:
        self._note("sleep")
        super().sleep()
        self.version = None


def test_the_device_changes_hands_in_the_one_right_order(mesh: Mesh, tmp_path: Path):
    """Weights are read while the trainer is there; it comes back when the engine is asleep. Twice: an evaluation in
    between has cost the engine its weights."""
    saved_model("qwen3", True, tmp_path / "model")
    add_tokenizer(tmp_path / "model")
    built = config(tmp_path, {})
    policy, engine = build_policy(built, mesh), Engine(str(tmp_path / "model"), max_running_sequences=4)
    engine.memory, engine.log = TrainerMemory(policy, enabled=True), []
    prompt = Prompt(0, (5, 6, 7), (False, True, True), "1", "p", "toy")
    run = Run(
        config=built,
        methods=None,
        mesh=mesh,
        control=None,
        policy=policy,
        tokenizer=None,
        prompts=PromptStream((prompt,), seed=0, shuffle=False),
        selection=None,
        eval_plan=None,
        engine=engine,
        engine_group=build_engine_group(1),
        graders=None,
        scheduler=None,
        unfinished=None,
        background=None,
        trainer_memory=engine.memory,
        lease=None,
        clock=Clock(),
    )

    def sampling() -> list[Completion]:
        engine.submit([Request(0, (5, 6, 7), 8, 1.0, 3)])
        engine.log.append("sample")
        while not (ended := engine.step()):
            pass
        return ended

    drawn = []
    for _ in range(2):
        ended, sync = engine_turn.let_engine_sample(run, sampling)
        drawn.append(ended)
        assert sync is not None and 0 < sync.sync_difference < 1e-4
        assert not engine.memory.is_away and engine.version is None
    phase = ["load, trainer here", "wake, trainer away", "sample", "sleep, trainer away"]
    assert engine.log == phase + phase and drawn[0] == drawn[1]
    assert run.clock.take().keys() == {"update_weights", "wake", "sync_check", "sleep"}


def test_what_is_offloaded_and_what_cannot_be():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    for engine, asked, expected in (
        ("vllm", None, (False, True)),
        ("local", None, (False, False)),
        ("vllm", False, (False, False)),
        ("local", True, (True, True)),
    ):
        built = from_tree(tree(rollout={"engine": engine, "offload_trainer": asked}))
        assert (is_enabled(built, cpu), is_enabled(built, gpu)) == expected
    for section, name in (("ddp", "nccl_ub"), ("transformer", "enable_cuda_graph")):
        options = {"megatron": {section: {name: True}}}
        with pytest.raises(ConfigError, match=f"megatron.{section}.{name} needs .* set rollout.offload_trainer=false"):
            from_tree(tree(rollout={"engine": "vllm"}, **options))
        from_tree(tree(rollout={"engine": "vllm", "offload_trainer": False}, **options))

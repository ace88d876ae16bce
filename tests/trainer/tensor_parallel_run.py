"""Engines over two ranks each: `tensor_parallel_run.py MODEL OTHER_MODEL OUT`. Every rank writes what it drew.

The generators of the ranks differ, requests come in the middle, some are taken back: what would make ranks diverge.
"""

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

import torch
from records import PROMPT, group
from transformers import AutoModelForCausalLM

from lens_megatron.config import Config, from_tree
from lens_megatron.policy import platform
from lens_megatron.policy.hf_weights import read_hf_config
from lens_megatron.policy.parallel import shut_down
from lens_megatron.rollout.engine import Completion, Request
from lens_megatron.rollout.local import LocalEngine
from lens_megatron.rollout.vllm import options as vllm_options
from lens_megatron.rollout.vllm.engine import VllmEngine
from lens_megatron.rollout.vllm.tensor_parallel import (
    EngineGroup,
    EngineGroupError,
    TensorParallelEngine,
    build_engine_group,
    gather_to_leader,
    scatter_from_leader,
)
from lens_megatron.types import PurifiedPrompt, StepPrompt

SHORT, LONG = (5, 17, 9, 60, 33), tuple(3 + 7 * i % 90 for i in range(200))
CANCELLED = (4, 5)


def requests(engine_group: int) -> list[Request]:
    """The requests of one engine; the engine has cached LONG from the second one on."""
    temperatures = (1.0, 0.7, 0.0)
    return [
        Request(i, (LONG if i % 2 else SHORT)[engine_group:], 16 + i, temperatures[i % 3], 1000 * engine_group + 7 * i)
        for i in range(10)
    ]


class Recorded(VllmEngine):
    """Keeps what it completed, on followers too."""

    def step(self) -> list[Completion]:
        completions = super().step()
        self.completed += completions
        return completions


def phase(engine: TensorParallelEngine, engine_group: EngineGroup) -> None:
    """The leader's decisions, or following."""
    engine.wake()
    with engine.phase():
        if engine_group.leads:
            decide(engine, engine_group)


def decide(engine: TensorParallelEngine, engine_group: EngineGroup) -> None:
    """Requests in two parts, some of which are cancelled in the middle."""
    first, second = requests(engine_group.number)[:6], requests(engine_group.number)[6:]
    engine.submit(first)
    for _ in range(3):
        engine.step()
    assert engine.cancel(CANCELLED) > 0
    engine.submit(second)
    done = 0
    while done < 10 - len(CANCELLED):
        done += len(engine.step())


def drawn(model: str, other: str, engine_group: EngineGroup) -> list[list[dict]]:
    """Three phases: weights of `model`, of `other`, of `model` again."""
    config = configuration(model)
    vllm_options.check(config, read_hf_config(model))
    engine = Recorded(config, read_hf_config(model))
    together, found = TensorParallelEngine(engine, engine_group), []
    torch.manual_seed(torch.distributed.get_rank())
    for version, path in enumerate((model, other, model)):
        weights = AutoModelForCausalLM.from_pretrained(path).named_parameters()
        together.load_weights([(name, parameter.data) for name, parameter in weights], version)
        engine.completed = []
        phase(together, engine_group)
        found.append([asdict(completion) for completion in engine.completed])
        together.sleep()
    together.close()
    return found


def configuration(model: str) -> Config:
    return from_tree(
        {
            "run": {"directory": "unused"},
            "model": {"path": model},
            "data": {"train": "unused"},
            "rollout": {"engine": "vllm", "max_response_length": 32, "max_running_sequences": 5},
            "vllm": {"tensor_parallel_size": 2},
        }
    )


def said_when_ranks_differ(model: str, other: str, engine_group: EngineGroup) -> str:
    """The follower samples from another model."""
    engine = TensorParallelEngine(LocalEngine(model, max_running_sequences=16), engine_group)
    weights = AutoModelForCausalLM.from_pretrained(model if engine_group.leads else other).named_parameters()
    engine.load_weights([(name, parameter.data) for name, parameter in weights], 0)
    try:
        phase(engine, engine_group)
    except EngineGroupError as error:
        return str(error)
    return ""


def gathered_and_scattered(engine_group: EngineGroup) -> dict[str, list[int]]:
    """The follower was dealt more prompts than the leader. Indices of prompts, in order."""
    count, first = engine_group.rank + 1, 10 * torch.distributed.get_rank()
    purified = [PurifiedPrompt((1, 2), (1,), (0.5,) * 6) if i else None for i in range(count)]
    own = [StepPrompt(2 * (first + i), replace(PROMPT, index=first + i), purified[i]) for i in range(count)]
    led = gather_to_leader(engine_group, own)
    assert all((p.purified is None) == (p.prompt.index % 10 == 0) for p in led.prompts)
    assert all(p.place == 2 * p.prompt.index for p in led.prompts)
    sampled = [replace(group("10"), prompt=p.prompt, place=p.place) for p in led.prompts]
    back = scatter_from_leader(engine_group, sampled, led)
    return {"led": [p.prompt.index for p in led.prompts], "back": [g.prompt.index for g in back]}


def main(model: str, other: str, out: Path) -> None:
    platform.init_process_group(platform.install())
    engine_group, rank = build_engine_group(2), torch.distributed.get_rank()
    dealt = gathered_and_scattered(engine_group)
    said = said_when_ranks_differ(model, other, engine_group)
    found = {
        "engine": engine_group.number,
        "leads": engine_group.leads,
        "engines": engine_group.engines,
        "said": said,
        **dealt,
    }
    found["phases"] = drawn(model, other, engine_group)
    (out / f"rank_{rank}.json").write_text(json.dumps(found))
    shut_down()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))

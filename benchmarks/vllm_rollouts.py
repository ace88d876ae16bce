"""Measures rollout engines on the same work: tokens per second, LENS over GRPO, weight transfer, log-probabilities.

    OMP_NUM_THREADS=1 PYTHONPATH=.:kernels python -m benchmarks.vllm_rollouts --out benchmarks/results/vllm_rollouts_cpu_202611.json

There is one process with one thread, and weights are random. For tokens per second all requests come at once and every
completion has the full length. For the ratios one step is sampled with the real scheduler, as in `rollout_schedule`,
with verdicts by a hash and geometric lengths.
"""  # noqa: E501

import argparse
import copy
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from benchmarks.operators.results import environment
from benchmarks.rollout_schedule import measure_on, rounded, spread
from benchmarks.sampling import measured
from lens_megatron.config import Config, from_tree
from lens_megatron.policy import platform
from lens_megatron.policy.hf_weights import read_hf_config
from lens_megatron.policy.parallel import shut_down
from lens_megatron.rollout.engine import Completion, Request, RolloutEngine
from lens_megatron.rollout.local import LocalEngine
from lens_megatron.rollout.vllm.engine import VllmEngine

SIZES = (measured.Size("host_bound", 128, 4, 4, heads=4), measured.Size("arithmetic_bound", 384, 6, 8, heads=6))
"""About 1 and 15 million parameters, with heads that vLLM's attention on a CPU has."""

PROMPTS, SAMPLES, TOKENS, PROMPT_TOKENS = 32, 8, 64, 32


@dataclass(frozen=True, slots=True)
class Timed:
    """Holds tokens per second of each round, and of the sync before it."""

    tokens_per_second: list[float]
    sync_seconds: list[float]
    build_seconds: float


class LoggedVllm(VllmEngine):
    """Writes down [sequences, tokens in their caches, prompt tokens computed, CPU seconds] of every step."""

    log: list[list[float]]

    def step(self) -> list[Completion]:
        running = list(self.llm.engine_core.engine_core.scheduler.running)
        waiting = self.llm.engine_core.engine_core.scheduler.waiting
        prompt_tokens = sum(request.num_prompt_tokens for request in waiting)
        cells = sum(request.num_tokens for request in running)
        begin = time.process_time()
        ended = super().step()
        self.log.append([len(running) + len(waiting), cells, prompt_tokens, time.process_time() - begin])
        return ended


def configuration(model: Path, dtype: str = "float32") -> Config:
    return from_tree(
        {
            "run": {"directory": "unused"},
            "model": {"path": str(model), "dtype": dtype},
            "data": {"train": "unused", "max_prompt_length": 64},
            "rollout": {
                "engine": "vllm",
                "max_response_length": measured.LIMIT,
                "max_running_sequences": measured.RUNNING,
            },
        }
    )


def weights(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    return ((name, parameter.data) for name, parameter in model.named_parameters())


def requests(vocabulary: int, seed: int) -> list[Request]:
    generator = torch.Generator().manual_seed(seed)
    prompts = torch.randint(1, vocabulary, (PROMPTS, PROMPT_TOKENS), generator=generator).tolist()
    return [
        Request(place * SAMPLES + sample, tuple(prompt), TOKENS, 1.0, 1000 * seed + place * SAMPLES + sample)
        for place, prompt in enumerate(prompts)
        for sample in range(SAMPLES)
    ]


def finish(engine: RolloutEngine, asked: Sequence[Request]) -> list[Completion]:
    engine.submit(asked)
    done: list[Completion] = []
    while len(done) < len(asked):
        done += engine.step()
    return done


def throughput(engines: dict[str, tuple[RolloutEngine, float]], model: PreTrainedModel, rounds: int) -> dict:
    """Measures engines in turn, so that other work of the machine affects them alike."""
    found = {name: Timed([], [], build) for name, (_, build) in engines.items()}
    for number in tqdm(range(rounds + 1), desc="tokens per second"):
        for name, (engine, _) in engines.items():
            start = time.perf_counter()
            engine.load_weights(weights(model), number)
            engine.wake()
            synced = time.perf_counter()
            done = finish(engine, requests(model.config.vocab_size, number))
            seconds = time.perf_counter() - synced
            if number:  # the first round includes the warm-up of all
                found[name].tokens_per_second.append(sum(len(c.token_ids) for c in done) / seconds)
                found[name].sync_seconds.append(synced - start)
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    return {
        name: {
            "tokens_per_second": spread(timed.tokens_per_second),
            "sync_seconds": spread(timed.sync_seconds),
            "sync_gb_per_second": size / statistics.median(timed.sync_seconds) / 1e9,
            "build_seconds": timed.build_seconds,
        }
        for name, timed in found.items()
    } | {"model_bytes": size}


@torch.no_grad()
def differences(engine: RolloutEngine, model: PreTrainedModel) -> dict:
    """Compares the engine's log-probabilities with those of transformers in one dtype, in nats and as probabilities."""
    nats, probabilities = [], []
    asked = {request.request_id: request for request in requests(model.config.vocab_size, 7)[::4]}
    for completion in finish(engine, list(asked.values())):
        prompt = asked[completion.request_id].prompt
        logits = model(torch.tensor([prompt + completion.token_ids])).logits[0, len(prompt) - 1 : -1]
        own = logits.float().log_softmax(-1).gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
        theirs = torch.tensor(completion.log_probs)
        nats.append((own - theirs).abs())
        probabilities.append((own.exp() - theirs.exp()).abs())
    nats, probabilities = torch.cat(nats), torch.cat(probabilities)
    return {
        "tokens": len(nats),
        "nats": {"mean": nats.mean().item(), "max": nats.max().item()},
        "probability": {"mean": probabilities.mean().item(), "max": probabilities.max().item()},
    }


def timed_engine(make: type, *arguments: object, **options: object) -> tuple[RolloutEngine, float]:
    start = time.perf_counter()
    return make(*arguments, **options), time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--calibration", type=int, default=2, help="seeds, the first ones, that the cost is fitted on")
    options = parser.parse_args()
    torch.set_num_threads(1)
    platform.init_process_group(platform.install())
    content = {"environment": environment(torch.device("cpu"), "benchmarks.vllm_rollouts"), "load": os.getloadavg()}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        content["sizes"] = [measure(size, folder / size.name, options) for size in SIZES]
    content["load_after"] = os.getloadavg()
    options.out.write_text(json.dumps(rounded(content)) + "\n")
    shut_down()


def measure(size: measured.Size, folder: Path, options: argparse.Namespace) -> dict:
    model = measured.make_engine(size, folder).model
    hf_config = read_hf_config(str(folder))
    engines = {
        "local": timed_engine(LocalEngine, str(folder), max_running_sequences=measured.RUNNING),
        "vllm": timed_engine(LoggedVllm, configuration(folder), hf_config),
    }
    vllm = engines["vllm"][0]
    vllm.log = []
    vllm.eos = []
    engines["local"][0].eos = torch.tensor([-1])
    found = {"size": size.name, "throughput": throughput(engines, model, options.rounds)}
    found["float32"] = differences(vllm, model)
    half = timed_engine(VllmEngine, configuration(folder, "bfloat16"), hf_config)[0]
    half.eos = []
    half.load_weights(((name, tensor.bfloat16()) for name, tensor in weights(model)), 0)
    half.wake()
    found["bfloat16"] = differences(half, copy.deepcopy(model).bfloat16())
    vllm.eos = list(range(measured.ENDS))
    return found | {"lens_over_grpo": measure_on(vllm, size, options.seeds, options.calibration)}


if __name__ == "__main__":
    main()

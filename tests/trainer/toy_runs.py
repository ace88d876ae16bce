"""A toy model's files, configurations for runs of seconds, and a way to run the real program on them."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
import warm_ranks
import yaml
from safetensors.torch import load_file
from transformers import Qwen3Config, Qwen3ForCausalLM

from lens_megatron.output.metrics import read_metrics
from lens_megatron.tools.demo.problems import stream, write_jsonl
from lens_megatron.tools.demo.tokenizer import train_tokenizer

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Toy:
    """A model directory and data files for runs that take seconds."""

    model: Path
    train: Path
    eval: Path

    def tree(self, directory: Path, **sections: dict) -> dict:
        """A configuration; `sections` are merged over it."""
        tree = {
            "run": {"directory": str(directory), "trackers": [], "seed": 4},  # each of four steps rescues
            "model": {"path": str(self.model)},
            "data": {"train": str(self.train), "max_prompt_length": 160, "instruction": "Answer in \\boxed{}."},
            "rollout": {"prompts_per_step": 4, "rollouts_per_prompt": 4, "max_response_length": 6},
            "reward": {"grader": "graders:compute_score"},
            "lens": {"min_score": 0.0, "tau": 1.0},
            "algorithm": {"kl_coef": 0.01},
            "optimizer": {"lr": 1e-3},
            "train": {"steps": 2, "max_tokens_per_micro_batch": 256, "save_interval": 2, "eval_interval": 0},
        }
        for name, options in sections.items():
            tree[name] = {**tree.get(name, {}), **options}
        return tree


def make_toy(folder: Path) -> Toy:
    """Writes a small random model and its data into `folder`."""
    problems = list(islice(stream("train", 0, {0: 1, 1: 1}), 400))
    tokenizer = train_tokenizer(line for p in problems for line in (p.problem, p.solution))
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer) + 1,  # not divisible by two: padding under TP2
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    model = Qwen3ForCausalLM(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data *= 4  # peaked enough for rewards and ratios to move within two steps
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    write_jsonl(folder / "train.jsonl", iter(problems), 24)
    write_jsonl(folder / "eval.jsonl", stream("eval", 0, {0: 1}), 8)
    return Toy(folder / "model", folder / "train.jsonl", folder / "eval.jsonl")


def command(tree: dict, folder: Path, ranks: int) -> list[str]:
    """Writes the configuration and returns what a user would type."""
    return [*torchrun(ranks), str(ROOT / "pretrain_lens.py"), "--config", str(write_config(tree, folder))]


def write_config(tree: dict, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def torchrun(ranks: int) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]


def environment() -> dict[str, str]:
    paths = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests" / "trainer"), os.environ.get("PYTHONPATH", "")]
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")}
    return {**kept, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}


def launch(tree: dict, folder: Path, ranks: int, *overrides: str) -> list[dict]:
    """Runs the program to its end; returns the rows of metrics.jsonl. Fails with its output when it fails."""
    run_program(tree, folder, ranks, *overrides)
    return read_metrics(Path(tree["run"]["directory"]))


def run_program(
    tree: dict, folder: Path, ranks: int, *overrides: str, status: int = 0, variables: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs the program to its end, as `run_ranks` does; returns what it printed."""
    words = ["--config", write_config(tree, folder), *overrides]
    return run_ranks(ranks, ROOT / "pretrain_lens.py", *words, status=status, variables=variables)


def run_ranks(
    ranks: int,
    program: Path,
    *arguments: str | Path,
    status: int = 0,
    timeout_s: float = 300,
    variables: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Runs a program on `ranks` processes, without torchrun, to its end. `variables` are added to their environment.

    Fails with its output unless `status` is the exit code of the first rank that does not end with 0.
    """
    result = warm_ranks.run([program, *arguments], ranks, environment() | dict(variables or {}), timeout_s)
    assert result.returncode == status, result.stdout[-3000:] + result.stderr[-6000:]
    return result


def start_ranks(
    ranks: int,
    program: Path,
    *arguments: str | Path,
    variables: Mapping[str, str] | None = None,
    together: bool = True,
    finalize: bool = False,
) -> AbstractContextManager[warm_ranks.Ranks]:
    """Starts a program as `run_ranks` does, for a block that sends signals or looks at what is printed meanwhile.

    Where `together` is False, a rank that fails does not end the others. With `finalize` a rank ends as the interpreter
    does, with all that was left open.
    """
    given = environment() | dict(variables or {})
    return warm_ranks.started([program, *arguments], ranks, given, together=together, finalize=finalize)


def checkpoint_tensors(directory: Path, step: int, ranks: int) -> dict[str, torch.Tensor]:
    folder = directory / "checkpoints" / f"iter_{step:07d}"
    return {
        f"{rank}/{name}": tensor
        for rank in range(ranks)
        for name, tensor in load_file(folder / f"rank_{rank:05d}.safetensors").items()
    }


def rollout_rows(directory: Path, step: int) -> list[dict]:
    return [json.loads(line) for line in (directory / "rollouts" / f"step_{step:06d}.jsonl").read_text().splitlines()]

"""Fine-tunes the instruct model on worked solutions, so that it solves and boxes what it can: model/ -> cold_start/.

At temperature 1 the instruct model rambles and hardly ever boxes an answer, so that reinforcement learning would find
nothing to reward. The solutions are of clean problems only: what noise does to the model stays to be learnt.

Every batch is a function of the seed and the step, so a run that goes on from a checkpoint is equal, to the bit, to one
that was never interrupted, on the same machine with the same number of threads.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from lens_megatron.tools.llm.fetch import checksum
from lens_megatron.tools.llm.folders import LlmError, LlmFolder, whole_folder
from lens_megatron.tools.llm.problems import LLM_INSTRUCTION, read_solutions
from lens_megatron.tools.llm.training_state import load_state, newest_step, save_state

IGNORED = -100
"""The label of a position that has no loss."""


@dataclass(frozen=True, slots=True)
class ColdStart:
    """Says how long the model is trained, and how."""

    steps: int = 50
    batch: int = 16
    """Solutions of one optimizer step."""
    micro_batch: int = 8
    """Solutions of one forward-backward pass. It bounds the memory and changes only the rounding."""
    lr: float = 3e-5
    warmup_steps: int = 5
    """Steps over which the learning rate rises to `lr`, where it stays."""
    checkpoint_interval: int = 10
    bfloat16: bool = True
    """Multiply matrices in bfloat16; weights and optimizer stay in float32."""
    seed: int = 0


@dataclass(frozen=True, slots=True)
class SolvedRow:
    """Token ids of a rendered prompt and of its solution, which ends with the end token."""

    prompt: tuple[int, ...]
    completion: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.completion)


def render_prompt(problem: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Returns the token ids of the prompt that the trainer renders with configs/llm.yaml."""
    messages = [{"role": "user", "content": f"{problem}\n{LLM_INSTRUCTION}"}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def encode(problem: str, solution: str, tokenizer: PreTrainedTokenizerBase) -> SolvedRow:
    """Returns the row that is trained on."""
    completion = tokenizer(solution, add_special_tokens=False)["input_ids"]
    return SolvedRow(tuple(render_prompt(problem, tokenizer)), (*completion, tokenizer.eos_token_id))


def batch_at(step: int, rows: Sequence[SolvedRow], options: ColdStart) -> list[SolvedRow]:
    """Returns the rows of a step, counted from 0: a pure function. Rows come once per epoch; a short rest is left out.

    They are sorted by length, which keeps the padding of micro-batches small.
    """
    epoch, place = divmod(step, len(rows) // options.batch)
    order = np.random.default_rng((options.seed, epoch)).permutation(len(rows))
    chosen = [rows[i] for i in order[place * options.batch : (place + 1) * options.batch]]
    return sorted(chosen, key=len)


def padded(rows: Sequence[SolvedRow], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns right-padded ids [B, S] and labels [B, S] in int64; a label is its own position's token, not the next."""
    length = max(map(len, rows))
    input_ids, labels = torch.full((len(rows), length), pad), torch.full((len(rows), length), IGNORED)
    for i, row in enumerate(rows):
        input_ids[i, : len(row)] = torch.tensor(row.prompt + row.completion)
        labels[i, len(row.prompt) : len(row)] = torch.tensor(row.completion)
    return input_ids, labels


def train_step(
    model: PreTrainedModel, optimizer: torch.optim.Optimizer, rows: Sequence[SolvedRow], pad: int, options: ColdStart
) -> float:
    """Makes one optimizer step; returns the mean negative log-likelihood of the batch's completion tokens in nats."""
    tokens, total = sum(len(row.completion) for row in rows), 0.0
    for start in range(0, len(rows), options.micro_batch):
        input_ids, labels = padded(rows[start : start + options.micro_batch], pad)
        with torch.autocast("cpu", torch.bfloat16) if options.bfloat16 else nullcontext():
            # Padding comes after everything that has a loss, so causal attention needs no mask.
            hidden = model.model(input_ids=input_ids).last_hidden_state[:, :-1]
            wanted = labels[:, 1:] != IGNORED
            logits = model.lm_head(hidden[wanted])  # the vocabulary is large: only positions with a loss
        loss = torch.nn.functional.cross_entropy(logits.float(), labels[:, 1:][wanted], reduction="sum") / tokens
        loss.backward()
        total += loss.item()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return total


def is_cold_started(folder: LlmFolder) -> bool:
    """Returns whether the fine-tuned model is there; it is there whole or not at all."""
    return (folder.cold_start / "cold_start.json").is_file()


def identity(base: Path, folder: LlmFolder, options: ColdStart) -> str:
    """Returns a checksum of everything that decides the result: base model, solutions and options."""
    files = [*sorted(base.glob("*.safetensors")), base / "tokenizer.json", folder.data / "cold_start.jsonl"]
    whole = json.dumps([[checksum(file) for file in files if file.is_file()], asdict(options)])
    return hashlib.sha256(whole.encode()).hexdigest()


def cold_start(folder: LlmFolder, base: Path, options: ColdStart) -> None:
    """Makes `cold_start/`, going on from the newest checkpoint of the same training.

    Raises:
        LlmError: the base model or the solutions are missing, or the checkpoints are of another training.
    """
    if not (base / "config.json").is_file():
        raise LlmError(f"{base} holds no model; run python -m lens_megatron.llm convert --out {folder.root} first")
    solutions = read_solutions(folder)
    if len(solutions) < options.batch:
        raise LlmError(f"{folder.data}/cold_start.jsonl has {len(solutions)} rows, a batch needs {options.batch}")
    began, name = time.perf_counter(), identity(base, folder, options)
    tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, trust_remote_code=False).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    losses = load_state(folder.checkpoints, name, model, optimizer) if newest_step(folder.checkpoints) else []
    rows = [encode(problem, solution, tokenizer) for problem, solution in solutions]
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    with tqdm(total=options.steps, initial=len(losses), desc="cold start", unit="step") as bar:
        for step in range(len(losses), options.steps):
            for group in optimizer.param_groups:
                group["lr"] = options.lr * min(1.0, (step + 1) / max(1, options.warmup_steps))
            losses.append(train_step(model, optimizer, batch_at(step, rows, options), pad, options))
            bar.set_postfix(loss=f"{losses[-1]:.3f}")
            bar.update()
            if (step + 1) % options.checkpoint_interval == 0 and step + 1 < options.steps:
                save_state(folder.checkpoints, name, losses, model, optimizer)
    record = {"identity": name, "base": str(base), "options": asdict(options), "losses": losses,
              "seconds_of_last_launch": round(time.perf_counter() - began, 1)}  # fmt: skip
    with whole_folder(folder.cold_start) as target:
        model.eval().save_pretrained(target)
        tokenizer.save_pretrained(target)
        (target / "cold_start.json").write_text(json.dumps(record, indent=1) + "\n")
    remove_checkpoints(folder)


def remove_checkpoints(folder: LlmFolder) -> None:
    """Removes the checkpoints of a cold start that is complete."""
    shutil.rmtree(folder.checkpoints, ignore_errors=True)


def check_same(folder: LlmFolder, base: Path, options: ColdStart) -> None:
    """Raises LlmError where `cold_start/` was made from another model, other solutions or other options."""
    file = folder.cold_start / "cold_start.json"
    try:
        made = json.loads(file.read_text())["identity"]
    except (ValueError, KeyError, TypeError) as error:
        raise LlmError(f"{file} is damaged ({error}); remove {folder.cold_start}, and run cold-start again") from error
    if made != identity(base, folder, options):
        raise LlmError(
            f"{folder.cold_start} was made from another model, other solutions or other options than are asked for "
            "now; give another --out, or remove that folder to train again"
        )

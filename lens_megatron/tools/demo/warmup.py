"""Makes the demo model: a small Qwen3 with a short supervised warm-up, so that it solves some problems and fails many.

Where a problem has a distracting number, some of the warm-up's solutions are wrong: they take it for one of the
problem's. The model learns both ways, so that reinforcement learning can choose between them.
"""

import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from lens_megatron.tools.demo import DEMO_INSTRUCTION
from lens_megatron.tools.demo.problems import Problem, distracted_solution, stream

IGNORED = -100
Row = tuple[list[int], list[int]]
"""Token ids of a prompt and of its completion."""


@dataclass(frozen=True, slots=True)
class WarmUp:
    """Says how long the model is trained, and on what."""

    steps: int = 850
    batch: int = 32
    lr: float = 5e-3
    noise_shares: tuple[tuple[int, float], ...] = ((0, 0.5), (1, 0.3), (2, 0.2))
    """Number of distractors -> share of the warm-up's problems."""
    distracted: float = 0.5
    """Share of solutions, among problems with a distracting number, that wrongly use it."""
    problems: int = 20_000
    seed: int = 0


def build_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """Builds a random Qwen3 of about 1.2 million parameters."""
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=160,
        intermediate_size=448,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        eos_token_id=end,
        pad_token_id=pad,
        bos_token_id=None,
    )
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=pad, do_sample=True)
    return model


def encode(problem: Problem, solution: str, tokenizer: PreTrainedTokenizerFast) -> Row:
    """Returns the token ids of prompt and completion. The prompt is what the trainer renders."""
    messages = [{"role": "user", "content": f"{problem.problem}\n{DEMO_INSTRUCTION}"}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
    completion = tokenizer(solution, add_special_tokens=False)["input_ids"]
    return prompt, [*completion, tokenizer.eos_token_id]


def warm_up(tokenizer: PreTrainedTokenizerFast, options: WarmUp) -> tuple[Qwen3ForCausalLM, float]:
    """Trains a fresh model on completions; returns it with the seconds that took. Deterministic in `options`."""
    start = time.perf_counter()
    torch.manual_seed(options.seed)
    model = build_model(tokenizer)
    problems = islice(stream("train", options.seed + 1, dict(options.noise_shares)), options.problems)
    rng = random.Random(options.seed)
    data = [
        encode(p, distracted_solution(p, rng) if rng.random() < options.distracted else p.solution, tokenizer)
        for p in problems
    ]
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, betas=(0.9, 0.98), weight_decay=0.01)
    warm, total = max(1, options.steps // 20), options.steps
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / warm) * max(0.05, 1 - step / total)
    )
    batches = _batches(data, options.batch, rng)
    model.train()
    for _ in tqdm(range(options.steps), desc="warm-up", unit="step"):
        input_ids, labels = _batch(next(batches), tokenizer.pad_token_id)
        hidden, targets = model.model(input_ids=input_ids).last_hidden_state[:, :-1], labels[:, 1:]
        wanted = targets != IGNORED
        loss = torch.nn.functional.cross_entropy(model.lm_head(hidden[wanted]), targets[wanted])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval(), time.perf_counter() - start


def _batches(data: list[Row], size: int, rng: random.Random) -> Iterator[list[Row]]:
    """Yields endless batches of rows of like length: random order, sorted within a window, which halves the padding."""
    window = 16 * size
    while True:
        order = rng.sample(data, len(data))
        for start in range(0, len(order) - window + 1, window):
            rows = sorted(order[start : start + window], key=lambda row: len(row[0]) + len(row[1]))
            cut = [rows[i : i + size] for i in range(0, window, size)]
            yield from rng.sample(cut, len(cut))


def _batch(rows: Sequence[Row], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded [B, S] ids and labels; the loss is on the completions."""
    length = max(len(prompt) + len(completion) for prompt, completion in rows)
    input_ids = torch.full((len(rows), length), pad)
    labels = torch.full((len(rows), length), IGNORED)
    for i, (prompt, completion) in enumerate(rows):
        tokens = torch.tensor(prompt + completion)
        input_ids[i, : len(tokens)] = tokens
        labels[i, len(prompt) : len(tokens)] = tokens[len(prompt) :]
    return input_ids, labels


@torch.no_grad()
def sampled_accuracy(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, problems: Sequence[Problem], seed: int = 0
) -> float:
    """The share of `problems` solved by one sample at temperature 1, compared as text (solutions are plain numbers)."""
    torch.manual_seed(seed)
    correct = 0
    for start in range(0, len(problems), 128):
        part = problems[start : start + 128]
        prompts = [encode(problem, "", tokenizer)[0] for problem in part]
        padded = tokenizer.pad({"input_ids": prompts}, return_tensors="pt", padding_side="left")
        output = model.generate(**padded, max_new_tokens=24, do_sample=True, top_k=0, temperature=1.0)
        texts = tokenizer.batch_decode(output[:, padded["input_ids"].shape[1] :], skip_special_tokens=True)
        correct += sum(f"\\boxed{{{p.answer}}}" in text for p, text in zip(part, texts, strict=True))
    return correct / len(problems)

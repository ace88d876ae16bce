"""Measures how many held-out problems a model solves at temperature 1, by the number of distractors planted in them.

    problems -> prompts -> one completion each -> last box -> Level -> evaluation/NAME.json, line by line

Answers are whole numbers, so a box counts as right where it reads the same as the answer.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from lens_megatron.files import write_atomically
from lens_megatron.reward.boxed import compare_cheaply, last_box
from lens_megatron.tools.llm.cold_start import render_prompt
from lens_megatron.tools.llm.fetch import checksum
from lens_megatron.tools.llm.folders import LlmError, LlmFolder
from lens_megatron.tools.llm.problems import Facts, WordProblem, held_out_problems

DISTRACTORS = (0, 1, 2, 3)
_BATCH = 48


@dataclass(frozen=True, slots=True)
class Sampling:
    """Says what is sampled."""

    facts: Facts
    problems: int = 48
    """Held-out problems of each number of distractors."""
    max_tokens: int = 64
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Level:
    """What was measured on the problems with one number of distractors."""

    distractors: int
    problems: int
    correct: int
    boxed: int
    """Completions with a box that can be read."""
    tokens: float
    """Mean tokens of a completion, the end token included."""


@dataclass(frozen=True, slots=True)
class Measured:
    """What `evaluation/NAME.json` holds."""

    model: str
    """The checksum of the weights."""
    sampling: Sampling
    levels: tuple[Level, ...]

    @property
    def is_complete(self) -> bool:
        return tuple(level.distractors for level in self.levels) == DISTRACTORS


def model_folder(path: Path) -> Path:
    """Returns `path`, or where it is the folder of a training run, its newest exported policy.

    Raises LlmError where there is no model.
    """
    if (path / "config.json").is_file():
        return path
    exported = sorted(config.parent for config in path.glob("checkpoints/iter_*/hf/config.json"))
    if not exported:
        raise LlmError(f"--model {path} holds no model (config.json) and no run with an exported policy; give another")
    return exported[-1]


def result_file(folder: LlmFolder, model: Path) -> Path:
    """Returns the place of a model's result, which is called after the last three parts of the model's path."""
    name = re.sub(r"[^\w.-]+", "_", "_".join(model.absolute().parts[-3:]))
    return folder.evaluation / f"{name}.json"


def evaluate(folder: LlmFolder, model: Path, sampling: Sampling) -> Measured:
    """Measures what `evaluation/` does not hold yet of the model and the sampling, and writes it there level by level.

    Raises LlmError where the model cannot be read.
    """
    file = result_file(folder, model)
    weights = "".join(checksum(part) for part in sorted(model.glob("*.safetensors")))
    done = read_measured(file)
    if done is None or (done.model, done.sampling) != (weights, sampling):
        done = Measured(weights, sampling, ())
    if done.is_complete:
        return done
    folder.evaluation.mkdir(exist_ok=True)
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
        policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, trust_remote_code=False).eval()
    except Exception as error:  # transformers raises anything at all on a damaged file
        raise LlmError(f"--model {model} cannot be read ({type(error).__name__}: {error}); make it again") from error
    for distractors in tqdm(DISTRACTORS[len(done.levels) :], desc="evaluate", unit="level"):
        problems = list(islice(held_out_problems(sampling.facts, distractors), sampling.problems))
        completions = sample(policy, tokenizer, problems, sampling, seed=100 * sampling.seed + distractors)
        done = Measured(weights, sampling, (*done.levels, _graded(distractors, problems, completions, tokenizer)))
        write_atomically(file, json.dumps(asdict(done), indent=1) + "\n")
    return done


def read_measured(file: Path) -> Measured | None:
    """Returns what a result file holds, or None where there is none that can be read."""
    try:
        tree = json.loads(file.read_text())
        levels = tuple(Level(**level) for level in tree["levels"])
        return Measured(tree["model"], Sampling(**tree["sampling"]), levels)
    except (OSError, ValueError, KeyError, TypeError):
        return None


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[WordProblem],
    sampling: Sampling,
    seed: int,
) -> list[list[int]]:
    """Returns the token ids of one completion per problem at temperature 1 from the whole distribution."""
    torch.manual_seed(seed)
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    options = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=sampling.max_tokens,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=pad,
    )  # fmt: skip
    completions: list[list[int]] = []
    for start in range(0, len(problems), _BATCH):
        prompts = [render_prompt(problem.text, tokenizer) for problem in problems[start : start + _BATCH]]
        padded = tokenizer.pad({"input_ids": prompts}, return_tensors="pt", padding_side="left")
        output = model.generate(**padded, generation_config=options)[:, padded["input_ids"].shape[1] :]
        completions += [_until_end(row.tolist(), tokenizer.eos_token_id) for row in output]
    return completions


def _until_end(tokens: list[int], end: int) -> list[int]:
    return tokens[: tokens.index(end) + 1] if end in tokens else tokens


def _graded(
    distractors: int,
    problems: Sequence[WordProblem],
    completions: Sequence[Sequence[int]],
    tokenizer: PreTrainedTokenizerBase,
) -> Level:
    boxes = [last_box(tokenizer.decode(tokens, skip_special_tokens=True))[0] for tokens in completions]
    correct = sum(
        box is not None and bool(compare_cheaply(box, problem.answer))
        for box, problem in zip(boxes, problems, strict=True)
    )
    tokens = sum(map(len, completions)) / len(completions)
    return Level(distractors, len(problems), correct, sum(box is not None for box in boxes), round(tokens, 1))


def table(measured: Measured) -> str:
    """Returns the result as lines of text."""
    lines = ["distractors  correct          boxed   tokens"]
    for level in measured.levels:
        share, boxed = 100 * level.correct / level.problems, 100 * level.boxed / level.problems
        counted = f"{level.correct}/{level.problems}"
        lines.append(f"{level.distractors:>11}  {counted:>7} {share:4.0f} %  {boxed:4.0f} %  {level.tokens:7.1f}")
    return "\n".join(lines)

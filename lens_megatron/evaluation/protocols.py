r"""Defines protocols: all that decides what a model is asked and how it answers, under one hash.

Two accuracies can be compared only if their protocols are equal: template, instruction, temperature and length move
published numbers by more than most methods do. A protocol is named (`NAMED`), or is a YAML file with the same fields:

    # mine.yaml
    base: r1.yaml                  # optional, another file; fields that are left out have the defaults below
    temperature: 0.7
    samples_of: {aime24: 32, aime25: 32}
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pydantic import Field, ValidationError, field_validator, model_validator

from lens_megatron.config import ConfigError, Section
from lens_megatron.config.files import read_tree
from lens_megatron.config.options import BOXED_INSTRUCTION
from lens_megatron.config.section import explain
from lens_megatron.reward.extractors import find_extractor

CHAT, PROBLEM = "chat", "{problem}"
COLDEST = 0.01
"""The least temperature besides 0: vLLM samples no colder."""
_FORMAT = 1
"""Part of the hash. It grows when the meaning of a field changes."""


class EvalProtocol(Section):
    """What a model is asked and how it is sampled. Records are frozen and equal if their fields are."""

    name: str = ""
    """A label that is no part of the hash. A YAML file's is its stem."""
    template: str = CHAT
    """`chat` is the chat template of the model's tokenizer; any other text is the whole prompt, with {problem} in it
    where the problem stands. Such a text is tokenized as plain text: with the tokenizer's beginning-of-sequence token,
    if it adds one."""
    instruction: str = ""
    """This text is appended to the problem after a newline, unless the problem contains it."""
    system_prompt: str | None = None
    """The system turn. Only with the template `chat`; empty leaves it to the chat template."""
    temperature: float = Field(1.0, ge=0, le=1e3)
    """0 takes the most probable token every time."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Only the most probable tokens, which together have at least this probability, are drawn from."""
    top_k: int = Field(0, ge=0)
    """Only this many most probable tokens are drawn from. 0: all."""
    max_tokens: int = Field(4096, ge=1)
    """Tokens of a completion, at most."""
    stop: tuple[str, ...] = ()
    """A completion ends before the first of these texts. One that is a single token of the tokenizer stops the engine,
    as the model's own end tokens do; what follows any other is cut off after sampling."""
    extractor: str = "boxed"
    """Finds the answer in a completion: a name of lens_megatron.reward.extractors."""
    samples: int = Field(1, ge=1, le=10_000)
    """Completions of every problem."""
    samples_of: dict[str, int] = {}
    """Completions of every problem of some benchmarks, by their names, instead of `samples`."""

    @field_validator("temperature")
    @classmethod
    def _not_too_cold(cls, value: float) -> float:
        if 0 < value < COLDEST:
            raise ValueError(f"give 0, or {COLDEST} and more")
        return value

    @field_validator("extractor")
    @classmethod
    def _known_extractor(cls, value: str) -> str:
        find_extractor(value)
        return value

    @field_validator("samples_of")
    @classmethod
    def _positive_samples(cls, value: dict[str, int]) -> dict[str, int]:
        for name, count in value.items():
            if not 1 <= count <= 10_000:
                raise ValueError(f"{name}: {count} samples; give 1 to 10000")
        return value

    @model_validator(mode="after")
    def _template_holds_the_problem(self) -> "EvalProtocol":
        if self.template != CHAT and self.template.count(PROBLEM) != 1:
            raise ValueError(
                f"template {self.template[:80]!r} has {PROBLEM} {self.template.count(PROBLEM)} times; write it once, "
                f"or give `template: {CHAT}`"
            )
        if self.template != CHAT and self.system_prompt is not None:
            raise ValueError(
                f"system_prompt stands beside a template of its own; write it into the template, or {CHAT}"
            )
        if any(not text for text in self.stop):
            raise ValueError("stop has an empty text, which every completion begins with; remove it")
        return self

    @property
    def hash(self) -> str:
        """The first 16 hexadecimal digits of SHA-256 over the canonical JSON of all fields but the name."""
        return hashlib.sha256(self.canonical().encode()).hexdigest()[:16]

    def canonical(self) -> str:
        """Returns the fields but the name as JSON, with sorted keys and without spaces: what the hash is of."""
        content = {"format": _FORMAT, **self.model_dump(mode="json", exclude={"name"})}
        return json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)

    def samples_for(self, benchmark: str) -> int:
        """Returns the completions of every problem of a benchmark."""
        return self.samples_of.get(benchmark, self.samples)

    def with_samples(self, count: int) -> "EvalProtocol":
        """Returns the protocol with `count` completions of every problem of every benchmark."""
        return self.model_copy(update={"samples": count, "samples_of": {}})


def _chatml(system: str, user: str) -> str:
    return f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n"


_QWEN_STOP = ("</s>", "<|im_end|>", "<|endoftext|>")
"""The stop words of Qwen2.5-Math's evaluation. A base model's end token is only the last of them."""

NAMED: Mapping[str, EvalProtocol] = MappingProxyType(
    {
        protocol.name: protocol
        for protocol in (
            # LENS, arXiv 2601.21244: temperature 1, top-p 1, 4096 tokens, Avg@16 on the small sets. The prompt is that
            # of training.
            EvalProtocol(
                name="lens-paper",
                instruction=BOXED_INSTRUCTION,
                temperature=1.0,
                max_tokens=4096,
                samples_of={"amc23": 16, "aime24": 16, "aime25": 16},
            ),
            # QwenLM/Qwen2.5-Math, evaluation/utils.py and math_eval.py: greedy, 2048 tokens.
            EvalProtocol(
                name="qwen-boxed",
                template=_chatml("You are a helpful assistant.", f"{PROBLEM}\n{BOXED_INSTRUCTION}"),
                temperature=0.0,
                max_tokens=2048,
                stop=_QWEN_STOP,
            ),
            # The same sources; arXiv 2503.20783 calls it the Qwen-Math template.
            EvalProtocol(
                name="qwen25-math-cot",
                template=_chatml(BOXED_INSTRUCTION, PROBLEM),
                temperature=0.0,
                max_tokens=2048,
                stop=_QWEN_STOP,
            ),
            # deepseek-ai/DeepSeek-R1, README: 0.6, top-p 0.95, 32,768 tokens, 64 responses, no system prompt.
            EvalProtocol(
                name="r1",
                instruction=BOXED_INSTRUCTION,
                temperature=0.6,
                top_p=0.95,
                max_tokens=32_768,
                samples=64,
            ),
            # "Understanding R1-Zero-like training" (arXiv 2503.20783): the bare problem, greedy, 3000 tokens.
            EvalProtocol(name="no-template", template=PROBLEM, temperature=0.0, max_tokens=3000),
        )
    }
)


def load_protocol(name: str) -> EvalProtocol:
    """Returns the named protocol, or that of a YAML file. Raises ConfigError, with the names that there are."""
    if name in NAMED:
        return NAMED[name]
    path = Path(name)
    if path.suffix.lower() not in (".yaml", ".yml"):
        raise ConfigError(f"no protocol is called {name!r}; known: {', '.join(NAMED)}, or a .yaml file of your own")
    return from_mapping({"name": path.stem, **read_tree(path)}, name)


def from_mapping(tree: Mapping[str, Any], where: str) -> EvalProtocol:
    """Returns the protocol with these fields. Raises ConfigError, which begins with `where` and lists every mistake."""
    try:
        return EvalProtocol.model_validate(tree)
    except ValidationError as error:
        mistakes = [explain(e, EvalProtocol, list(EvalProtocol.model_fields)) for e in error.errors()]
        raise ConfigError("\n".join(f"{where}: {mistake}" for mistake in mistakes)) from None


def describe(protocol: EvalProtocol) -> str:
    """Returns one line that names the protocol, its hash and its sampling."""
    sampling = "greedy" if protocol.temperature == 0 else f"temperature {protocol.temperature:g}"
    sampling += f", top-p {protocol.top_p:g}" * (protocol.top_p < 1) + f", top-k {protocol.top_k}" * bool(
        protocol.top_k
    )
    several = "".join(f", {count} of {name}" for name, count in protocol.samples_of.items())
    return (
        f"protocol {protocol.name} {protocol.hash}: {sampling}, {protocol.max_tokens} tokens, "
        f"{protocol.samples} sample{'s' * (protocol.samples > 1)} of a problem{several}, extractor {protocol.extractor}"
    )

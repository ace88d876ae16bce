"""Makes synthetic rollouts of a given length distribution, and models of a given shape with random weights."""

import math
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from lens_megatron.reward.types import GradeStatus
from lens_megatron.types import Origin, Rollout, Sample

Lengths = list[tuple[int, int]]
"""(prompt, response) tokens per sample."""

CPU_SHAPE = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 8192, "tie_word_embeddings": True}  # fmt: skip
TINY_SHAPE = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4,
              "num_key_value_heads": 2, "vocab_size": 1024, "tie_word_embeddings": True}  # fmt: skip
SHAPES = {
    "tiny": TINY_SHAPE,
    "cpu": CPU_SHAPE,
    "qwen2.5-1.5b": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
                     "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True},
    "qwen2.5-3b": {"hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16,
                   "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True},
}  # fmt: skip


def save_models(folder: Path, shape: str, dtype: torch.dtype) -> Path:
    """Writes `folder`/model and `folder`/model_reference, which differ slightly so that the KL term is not zero."""
    config = Qwen2Config(**SHAPES[shape], max_position_embeddings=8192, dtype=dtype)
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        model = Qwen2ForCausalLM(config)
    finally:
        torch.set_default_dtype(default)
    model.save_pretrained(folder / "model")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * parameter.std().nan_to_num() * torch.randn_like(parameter)
    model.save_pretrained(folder / "model_reference")
    return folder / "model"


def models_in(folder: Path, shape: str, dtype: torch.dtype) -> Path:
    """Returns the model that `save_models` writes into `folder`/`shape`; what is there already is used again."""
    place = folder / shape
    if not place.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as part:
            save_models(Path(part) / "made", shape, dtype)
            (Path(part) / "made").rename(place)
    return place / "model"


def lengths(kind: str, samples: int, limit: int, seed: int = 0) -> Lengths:
    """Draws lengths; `limit` bounds the whole sample when constant, the response in a long tail.

    constant: 1/8 prompt, 7/8 response. tail: responses are lognormal with median limit/5 and sigma 0.9, cut at the
    limit (about 4 % of them), prompts uniform in limit/64 to limit/16. These are assumptions, not data.
    """
    if kind == "constant":
        return [(limit // 8, limit - limit // 8)] * samples
    if kind != "tail":
        raise ValueError(f"kind: got {kind!r}, expected constant or tail")
    generator = random.Random(seed)
    return [
        (
            generator.randint(max(2, limit // 64), max(2, limit // 16)),
            max(1, min(limit, round(generator.lognormvariate(math.log(limit / 5), 0.9)))),
        )
        for _ in range(samples)
    ]


def describe(sizes: Lengths) -> dict[str, float]:
    whole = sorted(p + r for p, r in sizes)
    responses = [r for _, r in sizes]
    longest = max(responses)
    return {
        "samples": len(sizes),
        "tokens": sum(whole),
        "response_tokens": sum(responses),
        "median": whole[len(whole) // 2],
        "longest": whole[-1],
        "share_at_longest": round(sum(r == longest for r in responses) / len(responses), 3),
    }


def samples(sizes: Lengths, vocab_size: int, seed: int = 0) -> list[Sample]:
    """Random tokens, advantages +1 and -1 with random magnitudes, all sampled from the original prompt."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for prompt, response in sizes:
        tokens = torch.randint(0, vocab_size, (prompt + response,), generator=generator).tolist()
        advantage = float(torch.randn(1, generator=generator))
        rollout = Rollout(
            token_ids=tuple(tokens[prompt:]),
            log_probs=(0.0,) * response,
            finished=True,
            origin=Origin.NATIVE,
            weight_version=0,
            reward=float(advantage > 0),
            status=GradeStatus.CORRECT if advantage > 0 else GradeStatus.WRONG,
        )
        made.append(Sample(tuple(tokens[:prompt]), tuple(tokens[:prompt]), rollout, advantage, 1.0))
    return made


def split(made: Sequence[Sample], rank: int, ranks: int) -> list[Sample]:
    """Returns the samples of `rank`: consecutive ones, as the rollouts of one rank are."""
    return list(made[len(made) * rank // ranks : len(made) * (rank + 1) // ranks])

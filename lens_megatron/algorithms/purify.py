"""Makes the prompts of the second wave by the chosen purifier."""

from collections.abc import Callable, Sequence

from lens_megatron.algorithms.entry import Method
from lens_megatron.algorithms.purification import PromptEvidence, Purifier
from lens_megatron.config import LensConfig
from lens_megatron.types import Prompt, PurifiedPrompt

Retokenize = Callable[[tuple[int, ...]], tuple[int, ...]]
"""Turns token ids into text and back into token ids, for `lens.deletion=text`."""


def purify_prompts(
    prompts: Sequence[Prompt],
    evidence: Sequence[PromptEvidence],
    purifier: Method[Purifier],
    lens: LensConfig,
    *,
    seeds: Sequence[int],
    retokenize: Retokenize | None = None,
) -> list[PurifiedPrompt | None]:
    """Returns one purified prompt per prompt; None where the purifier wants no second wave, or would leave nothing."""
    return [
        _purify(prompt, found, purifier, lens, seed, retokenize)
        for prompt, found, seed in zip(prompts, evidence, seeds, strict=True)
    ]


def _purify(
    prompt: Prompt,
    evidence: PromptEvidence,
    purifier: Method[Purifier],
    lens: LensConfig,
    seed: int,
    retokenize: Retokenize | None,
) -> PurifiedPrompt | None:
    deletion = purifier.call(prompt, evidence, lens, seed, purifier.options)
    if deletion is None or len(deletion.positions) == len(prompt.token_ids):
        return None
    gone = set(deletion.positions)
    kept = tuple(token for place, token in enumerate(prompt.token_ids) if place not in gone)
    if gone and lens.deletion == "text" and retokenize is not None:
        kept = retokenize(kept)
    return PurifiedPrompt(kept, deletion.positions, deletion.scores)

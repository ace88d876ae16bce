"""Resampling: samples hard prompts a second time as they are, and deletes nothing (LENS, appendix E)."""

from lens_megatron.algorithms.entry import Entry, NoOptions
from lens_megatron.algorithms.purification import Deletion, PromptEvidence
from lens_megatron.config import LensConfig
from lens_megatron.types import Prompt


def resampling(
    prompt: Prompt, evidence: PromptEvidence, lens: LensConfig, seed: int, options: NoOptions
) -> Deletion | None:
    """Deletes nothing, so that a hard prompt gets as many more rollouts as with any other method.

    The second wave draws other seeds than the first. Its rollouts are on-policy, with a ratio of 1. The numbers of the
    deletion are all 0.
    """
    return Deletion((), (0.0,) * len(prompt.token_ids))


ENTRY = Entry(resampling, paper="LENS, arXiv 2601.21244, appendix E")

"""Gradient-based pruning: deletes the tokens on which the answer depends least (LENS, appendix E)."""

import torch

from lens_megatron.algorithms.entry import Entry, Evidence, NoOptions
from lens_megatron.algorithms.purification import Deletion, PromptEvidence
from lens_megatron.algorithms.purification.interference import select
from lens_megatron.config import LensConfig
from lens_megatron.types import Prompt


def gradient(
    prompt: Prompt, evidence: PromptEvidence, lens: LensConfig, seed: int, options: NoOptions
) -> Deletion | None:
    """Deletes the k eligible tokens with the smallest gradient norms, all at once; k is that of `interference`.

    The paper "prunes tokens with the smallest gradient norm" and does not say of which loss. Here it is the negative
    log-likelihood of the dataset's answer, written as `\\boxed{ANSWER}` right after the prompt: that of a rollout would
    need the trainer in the middle of sampling.

    The numbers of the deletion are the norms, of which the small ones decide. There is no noise floor, so None is
    returned only where no token is eligible. `seed` is for `lens.tie_break=random`.
    """
    if evidence.gradients is None:
        raise ValueError("the purifier gradient needs the prompt's gradients, got None")
    keep = select(-evidence.gradients, torch.tensor(prompt.eligible), lens, seed)
    if bool(keep.all()):
        return None
    return Deletion(tuple((~keep).nonzero().flatten().tolist()), tuple(evidence.gradients.tolist()))


ENTRY = Entry(gradient, paper="LENS, arXiv 2601.21244, appendix E", needs=frozenset({Evidence.PROMPT_GRADIENTS}))

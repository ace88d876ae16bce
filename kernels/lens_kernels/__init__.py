"""Computes log-probabilities, scores and policy losses of language models without a full log-softmax.

Every signature uses these letters: T rows (tokens; any leading shape), V vocabulary columns on this rank, H hidden
size, P packed prompts. No module is named after a function, so that `lens_kernels.<module>` stays a module.
"""

from lens_kernels.clipped_loss import PolicyLoss, policy_loss
from lens_kernels.kl import k3
from lens_kernels.linear_logprobs import linear_token_logprobs
from lens_kernels.linear_loss import linear_policy_loss
from lens_kernels.logprobs import token_logprobs
from lens_kernels.scores import interference_scores
from lens_kernels.selection import select_interference_tokens
from lens_kernels.shard import VocabShard

__version__ = "0.1.0"

__all__ = [
    "PolicyLoss",
    "VocabShard",
    "interference_scores",
    "k3",
    "linear_policy_loss",
    "linear_token_logprobs",
    "policy_loss",
    "select_interference_tokens",
    "token_logprobs",
]

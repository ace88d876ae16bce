"""Defines the losses of response tokens: one file per method, which `algorithm.ratio` chooses by its name here.

An objective sees one log-probability and one entropy per token. `lens_kernels` computes all that has vocabulary size,
such as the LM head, and differentiates these losses. A new method is a file with a function of the type `LossFunction`,
a line below, and its name in the option.
"""

from lens_megatron.algorithms.objectives.objective import (
    FusedLossArguments,
    LossFunction,
    Objective,
    ObjectiveResult,
)
from lens_megatron.algorithms.objectives.sequence_level import sequence_ratio
from lens_megatron.algorithms.objectives.token_level import fused_arguments, token_ratio

__all__ = ["OBJECTIVES", "FusedLossArguments", "LossFunction", "Objective", "ObjectiveResult"]

OBJECTIVES: dict[str, Objective] = {
    "token": Objective(token_ratio, fused=fused_arguments),
    "sequence": Objective(sequence_ratio, whole_sequences=True),
    "sequence_geometric": Objective(sequence_ratio, whole_sequences=True),
}

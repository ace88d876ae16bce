"""Judges each rollout of a group: one file per method, which `algorithm.advantage` chooses by its name here.

A new method is a file with a function of the type `Estimator`, a line below, and its name in the option.
"""

from lens_megatron.algorithms.advantages.crpo import crpo
from lens_megatron.algorithms.advantages.estimator import Estimator, WeightedAdvantages
from lens_megatron.algorithms.advantages.grpo import grpo

__all__ = ["ADVANTAGES", "Estimator", "WeightedAdvantages"]

ADVANTAGES: dict[str, Estimator] = {"crpo": crpo, "grpo": grpo}

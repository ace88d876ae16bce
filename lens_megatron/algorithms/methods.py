"""Holds the methods that a run has chosen, one of each kind, with their options."""

from dataclasses import dataclass

from lens_megatron.algorithms.advantages import Advantage
from lens_megatron.algorithms.entry import Evidence, Method
from lens_megatron.algorithms.objectives import Surrogate
from lens_megatron.algorithms.purification import Purifier
from lens_megatron.algorithms.registry import Kind, choose
from lens_megatron.algorithms.rewards import RewardRule
from lens_megatron.algorithms.selection import SelectionFactory
from lens_megatron.config import Config


@dataclass(frozen=True, slots=True)
class Methods:
    """The methods of a run."""

    selection: Method[SelectionFactory]
    purifier: Method[Purifier] | None
    """None where nothing is purified."""
    reward_rules: tuple[Method[RewardRule], ...]
    """Applied in this order."""
    advantage: Method[Advantage]
    objective: Method[Surrogate]

    def need(self, evidence: Evidence) -> bool:
        """Returns whether any of the methods needs this evidence."""
        chosen = (self.selection, self.purifier, *self.reward_rules, self.advantage, self.objective)
        return any(evidence in method.needs for method in chosen if method is not None)


def load_methods(config: Config) -> Methods:
    """Returns the methods that `config` names. Raises ConfigError for an unknown one or for options it does not have.

    Imports the modules of methods that are the user's own.
    """
    selection, lens, algorithm = config.selection, config.lens, config.algorithm
    return Methods(
        selection=choose(Kind.SELECTION, selection.method, selection.options, "selection.method", "selection.options"),
        purifier=choose(
            Kind.PURIFICATION, lens.purifier, lens.purifier_options, "lens.purifier", "lens.purifier_options"
        )
        if lens.enabled
        else None,
        reward_rules=tuple(
            choose(Kind.REWARDS, name, options, "reward.rules", f"reward.rules.{name}")
            for name, options in config.reward.rules.items()
        ),
        advantage=choose(
            Kind.ADVANTAGES,
            algorithm.advantage,
            algorithm.advantage_options,
            "algorithm.advantage",
            "algorithm.advantage_options",
        ),
        objective=choose(
            Kind.OBJECTIVES,
            algorithm.objective,
            algorithm.objective_options,
            "algorithm.objective",
            "algorithm.objective_options",
        ),
    )

"""Defines the methods as pure functions on records. Nothing here knows ranks, devices or engines.

    registry.py   finds methods by name        entry.py   what a method declares        methods.py   those of a run
    selection/     which prompts a step samples, and on which of their groups it trains     (selection.method)
    purification/  which tokens of a hard prompt are deleted                                (lens.purifier)
    rewards/       how rewards change before it is decided which prompts are hard           (reward.rules)
    advantages/    how the rollouts of a group are judged                                   (algorithm.advantage)
    objectives/    the loss of a token with a given ratio                                   (algorithm.objective)

A method is a file of its kind's folder. Aggregations, corrections and weights are closed tables.
"""

"""Holds the programs beside training: plan, doctor and the demo. Nothing in the trainer imports them."""

"""Measures on the local engine how long the two waves of a step take, and simulates the rest."""

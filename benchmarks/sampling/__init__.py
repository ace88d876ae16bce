"""How long the two waves of a step take: measured on the local engine, simulated for the rest."""

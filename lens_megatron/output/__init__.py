"""What a run writes and says: console, metrics, rollouts, the report, and the folder that holds them."""

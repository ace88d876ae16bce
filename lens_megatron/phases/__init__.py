"""The phases of a step, in order: collect (with engine_turn, weight_sync and sync_check inside), update; evaluate."""

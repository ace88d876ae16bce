"""Prepares samples for the update: balances them, redistributes them among ranks, cuts micro-batches, packs them."""

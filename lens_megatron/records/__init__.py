"""Turns records into bytes (`codec`), and sends them from rank to rank (`between_ranks`)."""

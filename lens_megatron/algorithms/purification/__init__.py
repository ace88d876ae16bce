"""Purifies prompts: decides which tokens of a prompt are deleted before it is sampled a second time."""

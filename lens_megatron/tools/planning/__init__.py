"""Computes what a configuration will need, by arithmetic alone: no torch, no GPU, no weights.

config.json -> model_shape        cluster -> hardware
              \\                    /
config   ->   layout (who holds what)  ->  activations -> memory (bytes by phase and component)
                                       ->  step_time (seconds by phase, bytes of weight sync)
                                       ->  checks (layouts that cannot be, and why)  ->  table (text)
"""

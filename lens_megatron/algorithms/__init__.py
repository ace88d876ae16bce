"""Defines the methods as pure functions on records. Nothing here knows ranks, devices or engines.

Where the configuration chooses between methods, a registry names them: `advantages`, `objectives`, `aggregation` and
`corrections`.
"""

"""Sinks for metrics beside metrics.jsonl: TensorBoard, wandb and trackio, one file each.

`run.trackers` names them, tracker.py says what they have in common, and opening.py opens them. Only TensorBoard is
installed with the project.
"""

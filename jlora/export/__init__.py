"""Adapters out of the engine: merged into a checkpoint, joined into one, taken from a tuned model.

combine.py (several adapters to one delta), changes.py (what a delta does to each tensor),
checkpoint.py (a merged checkpoint), adapter.py (a PEFT folder), extract.py (the difference of two
checkpoints), svd.py, folder.py (a folder that is there in whole or not at all).
"""

"""Checkpoints in ranks: strategies, their files, splitting, merging and both at once."""

"""Checkpoints in: formats, streaming reads and writes, and the packed cache."""

from llm_boost.checkpoint.checkpoint import Checkpoint, TensorInfo, open_checkpoint

__all__ = ["Checkpoint", "TensorInfo", "open_checkpoint"]

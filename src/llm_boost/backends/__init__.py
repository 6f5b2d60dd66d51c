"""Engines behind one protocol: the built-in one, and a door for others."""

from llm_boost.backends.backend import Backend, Capabilities, ModelInfo
from llm_boost.backends.registry import backend_class

__all__ = ["Backend", "Capabilities", "ModelInfo", "backend_class"]

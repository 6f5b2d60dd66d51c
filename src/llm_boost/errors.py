"""The exception tree. A message is one line: the file or field, the value, what is allowed, what to do."""

from __future__ import annotations


class LLMBoostError(Exception):
    """Anything this package reports on purpose; `exit_code` is what the command line ends with."""

    exit_code = 1


class InputError(LLMBoostError):
    """The caller's input is at fault: a file, a setting or a request. Exit code 2."""

    exit_code = 2


class ConfigError(InputError):
    """A YAML file, a flag or an environment variable holds a wrong value."""


class CheckpointError(InputError):
    """A model directory or file is missing, damaged or not supported."""


class TokenizerError(InputError):
    """A tokenizer file or a chat template cannot be used."""


class RequestError(InputError, ValueError):
    """A prompt or a sampling parameter is out of range."""


class EngineError(LLMBoostError):
    """The engine itself failed (not the caller's input)."""

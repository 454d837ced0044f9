"""Everything dllm_ext raises on purpose is a DLLMError. The native code raises these same classes.

Each one is also the built-in exception that Python users expect, so `except ValueError` catches a wrong setting. A
message names the argument, its value and what is allowed.
"""

__all__ = [
    "BuildError",
    "CheckpointError",
    "ConfigError",
    "DLLMError",
    "InputError",
    "Interrupted",
    "NumericalError",
    "OutOfMemoryError",
    "UsageError",
]


class DLLMError(Exception):
    """Base of every error that dllm_ext raises on purpose."""


class ConfigError(DLLMError, ValueError):
    """A setting, or a combination of settings, that is not allowed."""


class InputError(DLLMError, ValueError):
    """A prompt, or a corpus, that this model cannot take."""


class CheckpointError(DLLMError, ValueError):
    """A model folder or repository that is missing, damaged, incomplete or of an unsupported architecture."""


class NumericalError(DLLMError, ArithmeticError):
    """NaN or infinity in the model's arithmetic: generation stops instead of returning tokens that mean nothing."""


class OutOfMemoryError(DLLMError, MemoryError):
    """Weights, caches or activations do not fit in memory."""


class UsageError(DLLMError, RuntimeError):
    """The API was called in an order or place where it cannot work, e.g. `generate()` from within `on_step`."""


class Interrupted(DLLMError):
    """`on_step` returned False. (Ctrl-C raises KeyboardInterrupt instead.)"""


class BuildError(DLLMError, ImportError):
    """The compiled module is missing, or was built against another torch."""

"""Native inference for masked-diffusion language models (LLaDA, Dream).

>>> from dllm_ext import Engine
>>> engine = Engine.from_pretrained("mini-llada")
>>> engine.generate("Tom has 3 apples. He buys 4 more. How many apples does Tom have now?").text
"""

from .errors import *  # noqa: F403
from .errors import BuildError
from .errors import __all__ as _errors


def _require_build():
    """BuildError, with what to do, unless the native module is there and was built against the torch that is there."""
    import torch  # also loads the libraries that the native module links to

    advice = "build it with `pip install -e .` in its source folder"
    try:
        from ._build_info import TORCH_VERSION, VERSION

        if torch.__version__.split("+")[0] != TORCH_VERSION.split("+")[0]:  # +cpu and +cu130 share their C++ symbols
            raise BuildError(
                f"dllm_ext was built for torch {TORCH_VERSION}, but torch {torch.__version__} is installed: re{advice}"
            )
        from . import _C  # noqa: F401
    except ModuleNotFoundError as e:
        raise BuildError(f"dllm_ext has no compiled module ({e.name} is missing): {advice}") from None
    except ImportError as e:
        if isinstance(e, BuildError):
            raise
        raise BuildError(f"the compiled module of dllm_ext does not load ({e}): re{advice}") from None
    return VERSION


__version__ = _require_build()

from ._C import StepEvent  # noqa: E402
from .config import D2Cache, DLLMCache, DualCache, GenerationConfig, NoCache, PrefixCache  # noqa: E402
from .engine import Engine, Result, Stats  # noqa: E402
from .frequencies import TokenFrequencies  # noqa: E402
from .quantize import quantize  # noqa: E402

__all__ = [
    "D2Cache",
    "DLLMCache",
    "DualCache",
    "Engine",
    "GenerationConfig",
    "NoCache",
    "PrefixCache",
    "Result",
    "Stats",
    "StepEvent",
    "TokenFrequencies",
    "__version__",
    "quantize",
    *_errors,
]

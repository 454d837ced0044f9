"""What the published LLaDA programs need in order to run, unmodified, from a checkout, with a present-day transformers.

They are imported from the folder that the user names; nothing of them is kept here. They were written for transformers
4.4x and for LLaDA's own config.json, and import evaluation tools that a measurement does not touch.
"""

import contextlib
import sys
import time
import types
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from unittest import mock

import torch
from transformers import PreTrainedModel

from .checkpoint import load_config, load_tensors

# Keys of LLaDA's config.json that say which architecture this is; a random checkpoint's config gives the sizes.
ARCHITECTURE = {
    "activation_type": "silu",
    "block_type": "llama",
    "layer_norm_type": "rms",
    "rope": True,
    "rope_full_precision": True,
    "alibi": False,
    "attention_dropout": 0.0,
    "attention_layer_norm": False,
    "embedding_dropout": 0.0,
    "residual_dropout": 0.0,
    "flash_attention": False,
    "include_bias": False,
    "include_qkv_bias": False,
    "bias_for_layer_norm": False,
    "input_emb_norm": False,
    "layer_norm_with_affine": True,
    "multi_query_attention": None,
    "scale_logits": False,
    "use_cache": False,
    "init_device": "cpu",
}
# What transformers 5 no longer sets by itself.
CONFIG_DEFAULTS = {"use_return_dict": True, "output_attentions": False, "output_hidden_states": False}


def add_source(source: str, *needed: str) -> None:
    """Put a checkout on the import path. FileNotFoundError if it lacks one of the files `needed`."""
    for name in needed:
        if not (Path(source) / name).exists():
            raise FileNotFoundError(f"{name} is missing in the folder given")
    sys.path.insert(0, source)


def bare_package(name: str, folder: Path) -> None:
    """Make `name` importable from `folder` without running its __init__, which may import far more than is needed."""
    package = types.ModuleType(name)
    package.__path__ = [str(folder)]
    sys.modules[name] = package


class Anything(types.ModuleType):
    """A module whose every name is a class that can be called, subclassed and asked for anything, and does nothing."""

    __path__ = ()

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        quiet = staticmethod(lambda *args, **kwargs: None)
        made = type(name, (), {"__init__": lambda self, *args, **kwargs: None})
        for method in ("bind", "debug", "info", "warning", "register_new_resolver"):
            setattr(made, method, quiet)
        setattr(self, name, made)
        return made


def replace_missing(*modules: str) -> None:
    """Stand-ins for modules that are imported but not used, where they are not installed."""
    for name in modules:
        try:
            import_module(name)
        except ImportError:
            sys.modules[name] = Anything(name)


def load(model_class: type, config_class: type, folder: str, dtype: torch.dtype) -> torch.nn.Module:
    """The original model with the checkpoint's weights: in place, where they are mapped, if they have that dtype."""
    settings = {**ARCHITECTURE, **load_config(folder)}
    settings.pop("torch_dtype", None)
    config = config_class(**settings)
    for name, value in {**CONFIG_DEFAULTS, **settings}.items():
        if not hasattr(config, name):
            setattr(config, name, value)
    with contextlib.ExitStack() as stack:
        for layer in (torch.nn.Linear, torch.nn.Embedding):  # no time for weights that are replaced
            stack.enter_context(mock.patch.object(layer, "reset_parameters", lambda self: None))
        stack.enter_context(mock.patch.object(PreTrainedModel, "post_init", lambda self: None))
        model = model_class(config)
    tensors = {name: t.to(dtype) for name, t in load_tensors(folder).items()}
    model.load_state_dict(tensors, strict=True, assign=True)
    return model.eval()


def count_forwards(model: torch.nn.Module) -> list[int]:
    """[n], where n goes up by one with each forward of the model."""
    count = [0]

    def add(*_):
        count[0] += 1

    model.register_forward_hook(add)
    return count


def time_calls(run: Callable[[], object], repeats: int) -> list[float]:
    """Seconds of each call."""
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - begin)
    return seconds


def some_tokens(n: int, vocab_size: int) -> torch.Tensor:
    return (torch.arange(n) * 2654435761 % vocab_size)[None]

"""Engines on the emulated CUDA device beside the same models on the CPU, for tests."""

import importlib.util
import os
from pathlib import Path

import pytest

from dllm_ext import _C, GenerationConfig
from dllm_ext.config import native_fields

FOLDER = Path(__file__).parents[2] / "build" / "current" / "emulated"


def load_module():
    """_C_emulated: the native module with the CUDA sources over the emulator (ninja -C build/current emulated)."""
    files = sorted(FOLDER.glob("_C_emulated*.so"))
    if not files:
        reason = f"no emulated device: build it with ninja -C build/current emulated (looked in {FOLDER.name}/)"
        if os.environ.get("DLLM_REQUIRE_EMULATED") == "1":
            pytest.fail(reason)
        pytest.skip(reason, allow_module_level=True)
    spec = importlib.util.spec_from_file_location("_C_emulated", files[0])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Pair:
    """One model on both devices."""

    def __init__(self, module, folder, dtype="float32", quantization=None):
        self.cpu = _C.Engine(os.fsencode(folder), dtype, quantization)
        self.cuda = module.Engine(os.fsencode(folder), dtype, quantization, None, "cuda")

    def generate(self, prompts, batch_size=8, infill=False, **settings):
        """Results of both, lists in the order of the prompts."""
        fields = native_fields(GenerationConfig(**settings))
        return [e.generate(prompts, infill, fields, batch_size) for e in (self.cpu, self.cuda)]


def facts(result):
    """What must agree between devices: tokens, when each was committed, and the rows of every step."""
    stats = result.stats
    return {
        "token_ids": result.token_ids,
        "prompt_ids": result.prompt_ids,
        "commit_steps": result.commit_steps,
        "nfe": result.nfe,
        **{name: stats[name] for name in ("rows", "logit_rows", "commits")},
    }

"""The decode path runs no ATen operator: torch lends its threads and nothing else."""

import pytest
import torch

from dllm_ext import Engine


def operators(run):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run()
    return {event.name for event in profile.events() if "::" in event.name}


@pytest.mark.parametrize("precision", [("float32", None), ("bfloat16", None), ("float32", "int8"), ("float32", "int4")])
@pytest.mark.parametrize("cache", ["none", "prefix", "dual", "dllm", "d2"])
def test_profile_shows_no_operator(cache, precision):
    dtype, quantization = precision
    engine = Engine.from_pretrained("mini-llada", dtype=dtype, quantization=quantization)
    settings = {"gen_length": 16, "block_length": 8, "cache": cache}

    def generate():
        engine.generate(list(range(5, 20)), threshold=0.9, temperature=0.5, **settings)
        engine.generate(list(range(5, 20)), cfg_scale=1.0, kl_threshold=0.1, **settings)

    assert operators(generate) == set()


def test_profile_sees_operators():
    assert "aten::add" in operators(lambda: torch.ones(1) + 1)

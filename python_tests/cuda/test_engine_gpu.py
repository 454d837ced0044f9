"""Rung 5, for a person with a GPU: the engine on it against the CPU, token for token in fp32. Never run so far."""

import models
import pytest
import torch

from dllm_ext import D2Cache, DLLMCache, Engine, _build_info

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not _build_info.CUDA, reason=f"CUDA: {_build_info.CUDA_REASON}"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"),
]
PROMPTS = [[5, 9, 13, 2, 7], [3, 4, 8], list(range(20, 60))]
CACHES = {
    "none": "none",
    "prefix": "prefix",
    "dual": "dual",
    "dllm": DLLMCache(kp=6, kr=3, rou=0.3),
    "d2": D2Cache(current_k=6, rollout_p=0.3),
}
DECODERS = {
    "threshold": {"threshold": 0.5},
    "count": {"num_transfer_tokens": 2},
    "factor": {"factor": 0.9},
    "entropy_bound": {"gamma": 1.5},
    "sampled": {"threshold": 0.3, "temperature": 0.8, "seed": 3},
    "guidance": {"threshold": 0.5, "cfg_scale": 1.0},
}


@pytest.fixture(scope="module", params=models.FAMILIES)
def folder(request, tmp_path_factory):
    return models.write_model(tmp_path_factory.mktemp(request.param), request.param)


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("cache", CACHES)
def test_tokens_of_the_cpu(folder, cache, decoder):
    settings = {"gen_length": 48, "block_length": 16, "cache": CACHES[cache], "stop_at_eos": False} | DECODERS[decoder]
    results = [
        Engine.from_pretrained(folder, device=d, dtype="float32").generate(PROMPTS, **settings) for d in ("cpu", "cuda")
    ]
    for cpu, cuda in zip(*results, strict=True):
        assert (cuda.token_ids, cuda.nfe) == (cpu.token_ids, cpu.nfe)


@pytest.mark.parametrize("quantization", [None, "int8", "int4"])
def test_mini_llada_answers(quantization):
    engine = Engine.from_pretrained("mini-llada", device="cuda", dtype="float32", quantization=quantization)
    r = engine.generate(
        "Sam has 4 coins. He wins 9 more. How many coins does Sam have now?", gen_length=64, cache="dual"
    )
    print(f"{r.stats.ms_per_forward:.3f} ms per forward")
    assert "13" in r.text

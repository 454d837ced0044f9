"""The launch list that benchmarks/cuda_prediction.py predicts from is what the engine launches."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import models
import pytest
from emulated_engine import load_module

from dllm_ext import GenerationConfig
from dllm_ext.config import native_fields

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import cuda_prediction

module = load_module()


@pytest.mark.parametrize(("weights", "quantization"), [("none", None), ("int8", "int8"), ("int4", "int4")])
def test_launches_of_a_step(tmp_path, weights, quantization):
    shape = dict(
        n_layers=2, d_model=128, n_heads=2, n_kv_heads=2, mlp_hidden_size=64, vocab_size=304, embedding_size=304
    )
    folder = models.write_model(tmp_path / "model", "llada", **shape)
    engine = module.Engine(str(folder), "bfloat16", quantization, None, "cuda")
    fields = native_fields(
        GenerationConfig(gen_length=16, block_length=16, num_transfer_tokens=4, cache="dual", stop_at_eos=False)
    )
    module.emulator.trace(True)
    prompt = [i % 200 for i in range(300)]
    engine.generate([prompt], False, fields, 1)
    ran = module.emulator.executed()
    begins = [i for i, (name, _) in enumerate(ran) if name == "plan"]
    step = [[name, kind] for name, kind in ran[begins[1] : begins[2]]]
    model = cuda_prediction.Model.read(folder / "config.json")
    case = cuda_prediction.Case(replace(model, layers=2), weights, 316, 16, 16, "bf16")
    listed = cuda_prediction.counts(cuda_prediction.launches(case))
    assert not cuda_prediction.compare(listed, json.loads(json.dumps(step)))

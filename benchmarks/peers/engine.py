"""This engine."""

import os

import torch

from dllm_ext import _C, Engine

# How a precision class is asked for: arguments of Engine.from_pretrained.
LOAD = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"dtype": "bfloat16", "quantization": "int8"},
    "int4": {"dtype": "bfloat16", "quantization": "int4"},
}
COUNTERS = ("rows", "layer_rows", "logit_rows", "attention_pairs", "weight_bytes")


class Peer:
    caches = ("none", "prefix", "dual", "dllm", "d2")
    partial_rows = True

    def __init__(self, folder: str, precision: str, threads: int):
        torch.set_num_threads(threads)
        self.engine = Engine.from_pretrained(os.fspath(folder), **LOAD[precision])

    def forward(self, rows: int, keys: int, repeats: int) -> list[float]:
        return _C.ops.time_steps(self.engine._native, rows, keys, repeats)

    def generate(self, prompt, gen_length, block_length, per_step, cache):
        r = self.engine.generate(
            prompt,
            gen_length=gen_length,
            block_length=block_length,
            num_transfer_tokens=per_step,
            cache=cache,
            stop_at_eos=False,
        )
        counters = {name: getattr(r.stats, name) for name in COUNTERS}  # per step; roofline.py makes a floor of them
        return {"token_ids": r.token_ids, "nfe": r.nfe, "counters": counters}

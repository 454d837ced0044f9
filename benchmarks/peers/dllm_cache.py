"""maomaocun/dLLM-cache: its hooks and its loop, on the copy of LLaDA's model that its checkout has, from a checkout.

Settings are this engine's defaults: prompt refreshed every 50 steps, response every 2, a quarter of its rows between.
"""

from importlib import import_module
from pathlib import Path

import torch

from . import originals

BLOCKS = "model.transformer.blocks"


def without_block_mask(forward):
    """The checkout's model passes a mask (None here) that its hooks for LLaDA do not take."""
    return lambda *args, block_mask=None, **kwargs: forward(*args, **kwargs)


class Peer:
    caches = ("none", "dllm")
    partial_rows = False

    def __init__(self, folder: str, precision: str, threads: int, source: str):
        torch.set_num_threads(threads)
        originals.add_source(source, "dllm_cache/__init__.py", "utils/generate_function.py", "mmada_models")
        originals.bare_package("mmada_models", Path(source) / "mmada_models")
        originals.bare_package("utils", Path(source) / "utils")
        from dllm_cache import hooks
        from dllm_cache.cache import dLLMCache
        from mmada_models.modeling_llada import LLaDAConfig, LLaDAModelLM

        self.hooks, self.cache = hooks, dLLMCache
        self.run = import_module("utils.generate_function").generate
        self.model = originals.load(LLaDAModelLM, LLaDAConfig, folder, getattr(torch, precision))
        self.nfe = originals.count_forwards(self.model)
        self.use(caching=False)

    def use(self, caching: bool):
        intervals = {"prompt_interval_steps": 50, "gen_interval_steps": 2, "transfer_ratio": 0.25}
        self.cache.new_instance(**intervals, cfg_interval_steps=1)
        self.hooks.logout_cache_LLaDA(self.model, BLOCKS)
        if not caching:
            return
        self.hooks.register_cache_LLaDA(self.model, BLOCKS)
        for block in self.model.get_submodule(BLOCKS):
            block.forward = without_block_mask(block.forward)

    @torch.inference_mode()
    def forward(self, rows: int, keys: int, repeats: int) -> list[float]:
        x = originals.some_tokens(keys, self.model.config.vocab_size)
        self.use(caching=False)
        self.model(x)
        return originals.time_calls(lambda: self.model(x), repeats)

    def generate(self, prompt, gen_length, block_length, per_step, cache):
        self.use(caching=cache == "dllm")
        self.nfe[0] = 0
        tokens = self.run(
            torch.tensor([prompt]),
            None,
            self.model,
            steps=gen_length // per_step,
            gen_length=gen_length,
            block_length=block_length,
            temperature=0.0,
            cfg_scale=0.0,
            mask_id=self.model.config.mask_token_id,
        )
        return {"token_ids": tokens[0].tolist()[-gen_length:], "nfe": self.nfe[0]}

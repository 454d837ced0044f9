"""NVlabs/Fast-dLLM: its LLaDA model, and its three loops (none, prefix, dual), from a checkout."""

import os

import torch

from . import originals


class Peer:
    caches = ("none", "prefix", "dual")
    partial_rows = True

    def __init__(self, folder: str, precision: str, threads: int, source: str):
        torch.set_num_threads(threads)
        originals.add_source(os.path.join(source, "llada"), "generate.py", "model/modeling_llada.py")
        originals.replace_missing("einops")  # imported, not used
        import generate
        from model.configuration_llada import LLaDAConfig
        from model.modeling_llada import LLaDAModelLM

        self.loops = {
            "none": generate.generate,
            "prefix": generate.generate_with_prefix_cache,
            "dual": generate.generate_with_dual_cache,
        }
        self.model = originals.load(LLaDAModelLM, LLaDAConfig, folder, getattr(torch, precision))

    @torch.inference_mode()
    def forward(self, rows: int, keys: int, repeats: int) -> list[float]:
        """As a step of its prefix cache: K and V of the positions before the rows are given."""
        x = originals.some_tokens(keys, self.model.config.vocab_size)
        cache = self.model(x, use_cache=True).past_key_values
        before = [tuple(t[:, :, : keys - rows] for t in layer) for layer in cache] if rows < keys else None
        last = x[:, keys - rows :]
        return originals.time_calls(lambda: self.model(last, past_key_values=before, use_cache=True), repeats)

    def generate(self, prompt, gen_length, block_length, per_step, cache):
        tokens, nfe = self.loops[cache](
            self.model,
            torch.tensor([prompt]),
            steps=gen_length // per_step,
            gen_length=gen_length,
            block_length=block_length,
            temperature=0.0,
            mask_id=self.model.config.mask_token_id,
        )
        return {"token_ids": tokens[0, len(prompt) :].tolist(), "nfe": nfe}

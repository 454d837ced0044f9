"""Kamichanw/d2Cache: its LLaDA model and loop with each of its caches, from a checkout.

Settings are this engine's defaults: dLLM-Cache kp 50, kr 2, rou 0.25; d2Cache p 0.1, k 32, sigma 10, w 4, and tokens
chosen with the certainty prior of the same sigma. Attention is "eager", as d2Cache needs the attention matrices.
"""

import os
from functools import partial

import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from . import originals

UNUSED = (
    *("hydra", "hydra.utils", "hydra.core", "hydra.core.hydra_config", "omegaconf", "accelerate", "accelerate.utils"),
    *("loguru", "dotenv", "dill", "lm_eval", "lm_eval.api", "lm_eval.api.model", "lm_eval.api.instance"),
    *("transformers.tokenization_utils", "transformers.tokenization_utils_fast"),
)


def default_rope(config, device=None, seq_len=None, **_):
    """What Dream's code, which is imported along, expects to find in transformers."""
    size = config.hidden_size // config.num_attention_heads
    return 1.0 / config.rope_theta ** (torch.arange(0, size, 2).float() / size), 1.0


class Peer:
    caches = ("none", "prefix", "dual", "dllm", "d2")
    partial_rows = False

    def __init__(self, folder: str, precision: str, threads: int, source: str):
        torch.set_num_threads(threads)
        originals.add_source(source, "src/generation/vanilla.py", "src/cache/d2cache.py")
        originals.replace_missing(*UNUSED)
        ROPE_INIT_FUNCTIONS.setdefault("default", default_rope)
        import src.generation
        import src.generation.utils
        from src.cache import PrefixCache, d2Cache, dLLMCache
        from src.models.llada import LLaDAConfig, LLaDAModelLM

        # Token frequencies are for a decoder that is not used here, and belong to another vocabulary.
        src.generation.utils.get_token_freq = lambda *_: None
        self.run = src.generation.generate
        self.settings = {
            "none": {"cache_cls": None},
            "prefix": {"cache_cls": PrefixCache},
            "dual": {"cache_cls": partial(PrefixCache, use_dual=True)},
            "dllm": {"cache_cls": partial(dLLMCache, kp=50, kr=2, rou=0.25)},
            "d2": {
                "cache_cls": partial(d2Cache, rollout_p=0.1, current_k=32, sigma=10.0, inflate_w=4),
                "sigma": 10.0,
            },
        }
        self.model = originals.load(LLaDAModelLM, LLaDAConfig, folder, getattr(torch, precision))
        self.model.config._attn_implementation = "eager"
        self.nfe = originals.count_forwards(self.model)
        os.environ["MASK_TOKEN_ID"] = str(self.model.config.mask_token_id)
        os.environ["EOS_TOKEN_ID"] = str(self.model.config.eos_token_id)

    @torch.inference_mode()
    def forward(self, rows: int, keys: int, repeats: int) -> list[float]:
        x = originals.some_tokens(keys, self.model.config.vocab_size)
        self.model(x)
        return originals.time_calls(lambda: self.model(x), repeats)

    def generate(self, prompt, gen_length, block_length, per_step, cache):
        self.nfe[0] = 0
        record = self.run(
            self.model,
            torch.tensor([prompt]),
            strategy="vanilla",
            gen_length=gen_length,
            block_length=block_length,
            num_transfer_tokens=per_step,
            alg="maskgit_plus",
            temperature=0.0,
            **self.settings[cache],
        )
        return {"token_ids": record[-1].generated_tokens[0].tolist(), "nfe": self.nfe[0]}

"""transformers' own Llama with full attention: what running LLaDA's layers through Hugging Face costs.

LLaDA's layers are Llama's without a causal mask. SDPA, the checkpoint's precision, ordinary linear layers, and no
cache: like the published LLaDA code, every forward computes all positions.
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from .checkpoint import load_config, load_tensors
from .loop import LoopPeer

NAMES = {
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "attn_out": "self_attn.o_proj",
    "ff_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "ff_out": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ff_norm": "post_attention_layernorm",
}
WHOLE_MODEL = {
    "model.transformer.wte.weight": "model.embed_tokens.weight",
    "model.transformer.ln_f.weight": "model.norm.weight",
    "model.transformer.ff_out.weight": "lm_head.weight",
}


def llama_name(name: str) -> str:
    """LLaDA's name of a tensor -> Llama's."""
    if name in WHOLE_MODEL:
        return WHOLE_MODEL[name]
    *_, layer, part, kind = name.split(".")  # model.transformer.blocks.3.q_proj.weight
    return f"model.layers.{layer}.{NAMES[part]}.{kind}"


class Peer(LoopPeer):
    caches = ("none",)
    partial_rows = False

    def __init__(self, folder: str, precision: str, threads: int):
        torch.set_num_threads(threads)
        c = load_config(folder)
        dtype = getattr(torch, precision)
        config = LlamaConfig(
            vocab_size=c["embedding_size"],
            hidden_size=c["d_model"],
            intermediate_size=c["mlp_hidden_size"],
            num_hidden_layers=c["n_layers"],
            num_attention_heads=c["n_heads"],
            num_key_value_heads=c["n_kv_heads"],
            max_position_embeddings=c["max_sequence_length"],
            rms_norm_eps=c["rms_norm_eps"],
            rope_theta=c["rope_theta"],
            attn_implementation="sdpa",
            use_cache=False,
            tie_word_embeddings=False,
            dtype=dtype,
        )
        config.is_causal = False
        tensors = {llama_name(k): v.to(dtype) for k, v in load_tensors(folder).items()}
        self.model = LlamaForCausalLM.from_pretrained(None, config=config, state_dict=tensors, dtype=dtype).eval()
        for layer in self.model.model.layers:
            layer.self_attn.is_causal = False
        self.mask_id, self.vocab_size = c["mask_token_id"], c["vocab_size"]

    def start(self, length):
        pass

    def logits(self, tokens, begin, end, wanted):
        return self.model(tokens[None], logits_to_keep=begin + wanted).logits[0].float()

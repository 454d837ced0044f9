"""The transformer of LLaDA and Dream in plain PyTorch, for any rows of a sequence, over a full-length KV cache.

Both are pre-norm Llama-like stacks with bidirectional attention (no mask of any kind):
    h = x + Wo Attn(rope(Wq n), rope(Wk n), Wv n),  n = norm(x)
    y = h + Wdown (silu(Wgate m) * Wup m),          m = norm(h)
LLaDA (arXiv 2502.09992): MHA, no bias, q and k rotated in fp32. The logits of row i are for position i.
Dream (arXiv 2508.15487): GQA, bias on q, k, v; cos and sin are cast to the model dtype before they are multiplied.
The logits of row i - 1 are for position i.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file


@dataclass(frozen=True)
class Shape:
    """What the formulas need from a config.json of either family."""

    family: str  # "llada" | "dream"
    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    eps: float  # of RMSNorm
    theta: float  # base of RoPE
    rope_full_precision: bool  # rotate in fp32 (LLaDA) or in the model dtype (Dream)
    tied: bool  # the LM head is the embedding
    mask_id: int
    stop_ids: tuple[int, ...]  # EOS first; then other end-of-text ids and, if the vocabulary has it, end of turn

    @property
    def head_dim(self):
        return self.d_model // self.n_heads

    @property
    def eos_id(self):
        return self.stop_ids[0]

    @property
    def shift(self):
        """The logits for position i are those of row i - shift."""
        return 1 if self.family == "dream" else 0


def stop_ids_of(config, vocab_size, end_of_turn):
    """eos_token_id (a number or a list), then the family's end-of-turn id where the vocabulary reaches so far."""
    eos = config["eos_token_id"]
    ids = list(eos) if isinstance(eos, list) else [eos]
    return tuple(ids + [end_of_turn] * (end_of_turn < vocab_size and end_of_turn not in ids))


def shape_of(config):
    """Shape from a parsed config.json (dict)."""
    family = config["model_type"].lower()
    if family == "llada":
        return Shape(
            family="llada",
            d_model=config["d_model"],
            n_layers=config["n_layers"],
            n_heads=config["n_heads"],
            n_kv_heads=config.get("n_kv_heads") or config["n_heads"],
            eps=config["rms_norm_eps"],
            theta=config["rope_theta"],
            rope_full_precision=config.get("rope_full_precision", True),
            tied=config["weight_tying"],
            mask_id=config["mask_token_id"],
            stop_ids=stop_ids_of(config, config["embedding_size"], 126348),  # <|eot_id|>
        )
    if family == "dream":
        return Shape(
            family="dream",
            d_model=config["hidden_size"],
            n_layers=config["num_hidden_layers"],
            n_heads=config["num_attention_heads"],
            n_kv_heads=config["num_key_value_heads"],
            eps=config["rms_norm_eps"],
            theta=config["rope_theta"],
            rope_full_precision=False,
            tied=config["tie_word_embeddings"],
            mask_id=config["mask_token_id"],
            stop_ids=stop_ids_of(config, config["vocab_size"], 151645),  # <|im_end|>
        )
    raise ValueError(f"unknown model_type {config['model_type']!r}")


NAMES = {
    "llada": {
        "embed": "model.transformer.wte",
        "final_norm": "model.transformer.ln_f",
        "head": "model.transformer.ff_out",
        "layer": "model.transformer.blocks.{}.",
        "attn_norm": "attn_norm",
        "q": "q_proj",
        "k": "k_proj",
        "v": "v_proj",
        "o": "attn_out",
        "mlp_norm": "ff_norm",
        "gate": "ff_proj",
        "up": "up_proj",
        "down": "ff_out",
    },
    "dream": {
        "embed": "model.embed_tokens",
        "final_norm": "model.norm",
        "head": "lm_head",
        "layer": "model.layers.{}.",
        "attn_norm": "input_layernorm",
        "q": "self_attn.q_proj",
        "k": "self_attn.k_proj",
        "v": "self_attn.v_proj",
        "o": "self_attn.o_proj",
        "mlp_norm": "post_attention_layernorm",
        "gate": "mlp.gate_proj",
        "up": "mlp.up_proj",
        "down": "mlp.down_proj",
    },
}


@dataclass
class KVCache:
    """Per layer, rotated K and V of every position: k, v of shape [n_layers, T, n_kv_heads, head_dim].

    Slots start as NaN: reading one that was never written shows.
    """

    k: torch.Tensor
    v: torch.Tensor

    def clone(self):
        return KVCache(self.k.clone(), self.v.clone())


def at_least_fp32(dtype):
    return torch.promote_types(dtype, torch.float32)


def rms_norm(x, weight, eps):
    """x / sqrt(mean(x^2) + eps) in fp32 or better, cast back to x's dtype, then times weight. x [R, d], weight [d]."""
    wide = x.to(at_least_fp32(x.dtype))
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def rotate_half(x):
    """(a, b) -> (-b, a) for the halves a, b of the last dimension."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((-b, a), dim=-1)


def rope(x, positions, theta, full_precision):
    """Half-split rotary embedding: x cos + rotate_half(x) sin, angle(p, i) = p * theta^(-2 i / head_dim).

    x [R, heads, head_dim]; positions int64 [R]. Angles, cos and sin in fp32 (fp64 for an fp64 x).
    full_precision: x is rotated in that dtype and cast back; else cos and sin are cast to x's dtype first.
    """
    head_dim = x.shape[-1]
    wide = at_least_fp32(x.dtype)
    inv_freq = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=wide) / head_dim)
    angle = positions.to(wide)[:, None] * inv_freq[None, :]
    angle = torch.cat((angle, angle), dim=-1)[:, None, :]  # [R, 1, head_dim]
    cos, sin = angle.cos(), angle.sin()
    if full_precision:
        return (x.to(wide) * cos + rotate_half(x.to(wide)) * sin).to(x.dtype)
    return x * cos.to(x.dtype) + rotate_half(x) * sin.to(x.dtype)


def attention(q, k, v, probabilities=None):
    """softmax(q k^T / sqrt(head_dim)) v over all T slots, in fp32 or better, cast back to q's dtype.

    q [R, n_heads, head_dim]; k, v [T, n_kv_heads, head_dim]; query head h reads kv head h // (n_heads / n_kv_heads).
    Returns [R, n_heads, head_dim]. probabilities: a list that the softmax [n_heads, R, T] is appended to.
    """
    wide = at_least_fp32(q.dtype)
    group = q.shape[1] // k.shape[1]
    k = k.to(wide).repeat_interleave(group, dim=1)
    v = v.to(wide).repeat_interleave(group, dim=1)
    scores = torch.einsum("rhd,thd->hrt", q.to(wide), k) / math.sqrt(q.shape[-1])
    weights = scores.softmax(dim=-1)
    if probabilities is not None:
        probabilities.append(weights)
    return torch.einsum("hrt,thd->rhd", weights, v).to(q.dtype)


class ReferenceModel:
    """LLaDA or Dream from a parsed config.json and a dict of tensors under their Hugging Face names."""

    def __init__(self, config, tensors, dtype=torch.float32):
        self.shape = shape_of(config)
        self.dtype = dtype
        names = NAMES[self.shape.family]

        def get(name, required=True):
            if required or name in tensors:
                return tensors[name].to(dtype)
            return None

        self.embed = get(names["embed"] + ".weight")  # [V, d]
        self.final_norm = get(names["final_norm"] + ".weight")  # [d]
        self.head = self.embed if self.shape.tied else get(names["head"] + ".weight")  # [V, d]
        self.layers = []
        for i in range(self.shape.n_layers):
            prefix = names["layer"].format(i)
            layer = {}
            for part in ("attn_norm", "q", "k", "v", "o", "mlp_norm", "gate", "up", "down"):
                layer[part] = get(prefix + names[part] + ".weight")
            for part in ("q", "k", "v"):
                layer[part + "_bias"] = get(prefix + names[part] + ".bias", required=False)
            self.layers.append(layer)

    @classmethod
    def from_folder(cls, folder, dtype=torch.float32):
        """Read config.json and every *.safetensors file of a folder."""
        folder = Path(folder)
        tensors = {}
        for file in sorted(folder.glob("*.safetensors")):
            tensors.update(load_file(file))
        return cls(json.loads((folder / "config.json").read_text()), tensors, dtype)

    @property
    def vocab_size(self):
        return self.head.shape[0]

    def new_cache(self, length):
        """An unwritten cache for `length` positions."""
        size = (self.shape.n_layers, length, self.shape.n_kv_heads, self.shape.head_dim)
        return KVCache(torch.full(size, math.nan, dtype=self.dtype), torch.full(size, math.nan, dtype=self.dtype))

    def linear(self, x, weight, bias=None):
        """x W^T + b: [R, in] -> [R, out]; every linear layer of the model."""
        return F.linear(x, weight, bias)

    @torch.no_grad()
    def forward(self, tokens, positions, cache, probabilities=None):
        """Run the rows `positions` (int64 [R], distinct) holding `tokens` (int64 [R]).

        In every layer, K and V of these rows are written to the cache first; then the rows attend to all T slots.
        A full forward is the one with positions 0..T-1. Returns the final-norm hidden states, model dtype [R, d].
        probabilities: a list that receives each layer's attention [n_heads, R, T].
        """
        s = self.shape
        rows = len(positions)
        x = self.embed[tokens]
        for i, w in enumerate(self.layers):
            n = rms_norm(x, w["attn_norm"], s.eps)
            q = self.linear(n, w["q"], w["q_bias"]).view(rows, s.n_heads, s.head_dim)
            k = self.linear(n, w["k"], w["k_bias"]).view(rows, s.n_kv_heads, s.head_dim)
            v = self.linear(n, w["v"], w["v_bias"]).view(rows, s.n_kv_heads, s.head_dim)
            q = rope(q, positions, s.theta, s.rope_full_precision)
            cache.k[i, positions] = rope(k, positions, s.theta, s.rope_full_precision)
            cache.v[i, positions] = v
            mixed = attention(q, cache.k[i], cache.v[i], probabilities)
            x = x + self.linear(mixed.reshape(rows, -1), w["o"])
            n = rms_norm(x, w["mlp_norm"], s.eps)
            x = x + self.linear(F.silu(self.linear(n, w["gate"])) * self.linear(n, w["up"]), w["down"])
        return rms_norm(x, self.final_norm, s.eps)

    @torch.no_grad()
    def logits(self, hidden):
        """LM head: [R, d] -> [R, V] in the model dtype."""
        return self.linear(hidden, self.head)

    def full_logits(self, tokens):
        """Logits [T, V] of a full forward of `tokens` (int64 [T]); row i, not shifted."""
        tokens = torch.as_tensor(tokens)
        return self.logits(self.forward(tokens, torch.arange(len(tokens)), self.new_cache(len(tokens))))

"""The best PyTorch programs of the same algorithm that we know how to write, as a yardstick for speed.

Same cache (Fast-dLLM's dual cache), same rows, same dtype, SDPA, fused QKV and gate/up projections, preallocated K and
V written in place, LM head for the rows that are still masked only, inference mode. `prepack=True` hands the linear
layers to oneDNN in its own weight layout (torch's private mkldnn operators, what torch.compile's freezing uses): the
stronger of the two.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from peers import loop
from peers.checkpoint import load_config, load_tensors


class Linear:
    """y = x W^T, plain or prepacked for oneDNN."""

    def __init__(self, weight: torch.Tensor, prepack: bool):
        self.n, self.packed = weight.shape[0], prepack
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, 32) if prepack else weight

    def __call__(self, x):
        if self.packed:
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, None, "none", [], "")
        return F.linear(x, self.weight)


class TorchLLaDA:
    """A `peers.loop.Model`."""

    def __init__(self, folder: Path, dtype: torch.dtype, prepack: bool = False):
        self.config = c = load_config(folder)
        self.dtype = dtype
        self.mask_id, self.vocab_size = c["mask_token_id"], c["vocab_size"]
        w = load_tensors(folder)

        def take(name):
            return w.pop(name + ".weight").to(dtype)

        self.heads, self.head_dim = c["n_heads"], c["d_model"] // c["n_heads"]
        self.embedding = take("model.transformer.wte")
        self.final_norm = take("model.transformer.ln_f")
        self.head = Linear(take("model.transformer.ff_out"), prepack)
        self.layers = []
        for i in range(c["n_layers"]):
            p = f"model.transformer.blocks.{i}."
            self.layers.append(
                {
                    "attn_norm": take(p + "attn_norm"),
                    "qkv": Linear(torch.cat([take(p + f"{n}_proj") for n in "qkv"]), prepack),
                    "out": Linear(take(p + "attn_out"), prepack),
                    "ffn_norm": take(p + "ff_norm"),
                    "gate_up": Linear(torch.cat([take(p + "ff_proj"), take(p + "up_proj")]), prepack),
                    "down": Linear(take(p + "ff_out"), prepack),
                }
            )
        inv_freq = 1.0 / c["rope_theta"] ** (torch.arange(0, self.head_dim, 2).float() / self.head_dim)
        angles = torch.outer(torch.arange(c["max_sequence_length"]).float(), inv_freq)
        self.cos, self.sin = (torch.cat([f, f], -1)[:, None, :] for f in (angles.cos(), angles.sin()))

    def norm(self, x, weight):
        return F.rms_norm(x, (x.shape[-1],), weight, self.config["rms_norm_eps"])

    def rotate(self, x, begin, end):
        """x [rows, heads, head_dim]; in fp32 as the model does it."""
        x = x.float()
        a, b = x.chunk(2, -1)
        return (x * self.cos[begin:end] + torch.cat([-b, a], -1) * self.sin[begin:end]).to(self.dtype)

    def start(self, length):
        shape = (self.heads, length, self.head_dim)
        self.keys = [torch.empty(shape, dtype=self.dtype) for _ in self.layers]
        self.values = [torch.empty(shape, dtype=self.dtype) for _ in self.layers]

    def logits(self, tokens, begin, end, wanted):
        """Rows [begin, end) of `tokens`, their K and V written in place; logits of the rows `wanted` (relative)."""
        rows, d = end - begin, self.config["d_model"]
        x = self.embedding[tokens[begin:end]]
        for layer, k_cache, v_cache in zip(self.layers, self.keys, self.values, strict=True):
            qkv = layer["qkv"](self.norm(x, layer["attn_norm"])).view(rows, 3, self.heads, self.head_dim)
            q, k = self.rotate(qkv[:, 0], begin, end), self.rotate(qkv[:, 1], begin, end)
            k_cache[:, begin:end] = k.transpose(0, 1)
            v_cache[:, begin:end] = qkv[:, 2].transpose(0, 1)
            a = F.scaled_dot_product_attention(q.transpose(0, 1)[None], k_cache[None], v_cache[None])[0]
            x = x + layer["out"](a.transpose(0, 1).reshape(rows, d))
            gate, up = layer["gate_up"](self.norm(x, layer["ffn_norm"])).chunk(2, -1)
            x = x + layer["down"](F.silu(gate) * up)
        return self.head(self.norm(x[wanted], self.final_norm)).float()

    def generate(self, prompt, gen_length, block_length, per_step, cache="dual"):
        """Greedy, `per_step` tokens a step. Returns (token ids, [(rows, seconds)] of the steps)."""
        return loop.generate(self, prompt, gen_length, block_length, per_step, cache)

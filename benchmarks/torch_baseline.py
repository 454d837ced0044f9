"""The best PyTorch programs of the same algorithm that we know how to write, as a yardstick for speed.

Same cache (Fast-dLLM's dual cache), same rows, same dtype, SDPA, fused QKV and gate/up projections, preallocated K and
V written in place, LM head for the rows that are still masked only, inference mode. `prepack=True` hands the linear
layers to oneDNN in its own weight layout (torch's private mkldnn operators, what torch.compile's freezing uses): the
stronger of the two.
"""

import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file


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
    def __init__(self, folder: Path, dtype: torch.dtype, prepack: bool = False):
        self.config = c = json.loads((Path(folder) / "config.json").read_text())
        self.dtype = dtype
        w = {k: v.to(dtype) for k, v in load_file(Path(folder) / "model.safetensors").items()}
        self.heads, self.head_dim = c["n_heads"], c["d_model"] // c["n_heads"]
        self.embedding = w["model.transformer.wte.weight"]
        self.final_norm = w["model.transformer.ln_f.weight"]
        self.head = Linear(w["model.transformer.ff_out.weight"], prepack)
        self.layers = []
        for i in range(c["n_layers"]):
            p = f"model.transformer.blocks.{i}."
            qkv = torch.cat([w.pop(p + f"{n}_proj.weight") for n in "qkv"])
            gate_up = torch.cat([w.pop(p + "ff_proj.weight"), w.pop(p + "up_proj.weight")])
            self.layers.append(
                {
                    "attn_norm": w[p + "attn_norm.weight"],
                    "qkv": Linear(qkv, prepack),
                    "out": Linear(w.pop(p + "attn_out.weight"), prepack),
                    "ffn_norm": w[p + "ff_norm.weight"],
                    "gate_up": Linear(gate_up, prepack),
                    "down": Linear(w.pop(p + "ff_out.weight"), prepack),
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

    def forward(self, tokens, begin, end, keys, values, wanted):
        """Rows [begin, end) of `tokens`, their K and V written in place; logits of the rows `wanted` (relative)."""
        rows, d = end - begin, self.config["d_model"]
        x = self.embedding[tokens[begin:end]]
        for layer, k_cache, v_cache in zip(self.layers, keys, values, strict=True):
            qkv = layer["qkv"](self.norm(x, layer["attn_norm"])).view(rows, 3, self.heads, self.head_dim)
            q, k = self.rotate(qkv[:, 0], begin, end), self.rotate(qkv[:, 1], begin, end)
            k_cache[:, begin:end] = k.transpose(0, 1)
            v_cache[:, begin:end] = qkv[:, 2].transpose(0, 1)
            a = F.scaled_dot_product_attention(q.transpose(0, 1)[None], k_cache[None], v_cache[None])[0]
            x = x + layer["out"](a.transpose(0, 1).reshape(rows, d))
            gate, up = layer["gate_up"](self.norm(x, layer["ffn_norm"])).chunk(2, -1)
            x = x + layer["down"](F.silu(gate) * up)
        return self.head(self.norm(x[wanted], self.final_norm)).float()

    @torch.inference_mode()
    def generate(self, prompt, gen_length, block_length, per_step):
        """Dual cache, greedy, `per_step` tokens a step. Returns (token ids, [(rows, seconds)] of the steps)."""
        mask = self.config["mask_token_id"]
        length = len(prompt) + gen_length
        tokens = torch.full((length,), mask)
        tokens[: len(prompt)] = torch.tensor(prompt)
        masked = torch.arange(length) >= len(prompt)
        shape = (self.heads, length, self.head_dim)
        keys = [torch.empty(shape, dtype=self.dtype) for _ in self.layers]
        values = [torch.empty(shape, dtype=self.dtype) for _ in self.layers]
        steps = []
        for block in range(len(prompt), length, block_length):
            begin, end = 0, length  # the first step of a block computes everything
            while masked[block : block + block_length].any():
                t = time.perf_counter()
                positions = block + masked[block : block + block_length].nonzero()[:, 0]
                logits = self.forward(tokens, begin, end, keys, values, positions - begin)
                log_sum = logits.logsumexp(-1)
                logits[:, mask] = -torch.inf
                best, ids = logits.max(-1)
                chosen = (best - log_sum).topk(min(per_step, len(positions))).indices
                tokens[positions[chosen]] = ids[chosen]
                masked[positions[chosen]] = False
                steps.append((end - begin, time.perf_counter() - t))
                begin, end = block, min(block + block_length, length)
        return tokens[len(prompt) :].tolist(), steps

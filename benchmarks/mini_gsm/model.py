"""The LLaDA transformer in plain PyTorch, for training: bidirectional, pre-norm, RoPE, SwiGLU, untied LM head.

Parameter names and config keys are those of LLaDA's own checkpoints, so that what is trained here loads wherever
LLaDA-8B does. Products run in bfloat16 and the residual stream in fp32 when `bf16` is set (training); all of it runs in
fp32 otherwise (evaluation).
"""

import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

NUMBER_PERIODS = (2, 4, 5, 10, 20, 25, 50, 100, 200)


def make_config(vocab_size: int, mask: int, eos: int, bos: int) -> dict:
    """mini-llada's config.json: LLaDA's keys, small values."""
    return {
        "activation_type": "silu", "alibi": False, "architectures": ["LLaDAModelLM"], "attention_dropout": 0.0,
        "attention_layer_norm": False, "bias_for_layer_norm": False, "block_group_size": 1, "block_type": "llama",
        "bos_token_id": bos, "d_model": 192, "embedding_dropout": 0.0, "embedding_size": vocab_size,
        "eos_token_id": eos, "flash_attention": False, "include_bias": False, "include_qkv_bias": False,
        "input_emb_norm": False, "layer_norm_type": "rms", "layer_norm_with_affine": True, "mask_token_id": mask,
        "max_sequence_length": 2048, "mlp_hidden_size": 512, "mlp_ratio": 4, "model_type": "llada",
        "multi_query_attention": None, "n_heads": 6, "n_kv_heads": 6, "n_layers": 6, "pad_token_id": eos,
        "precision": "amp_bf16", "residual_dropout": 0.0, "rms_norm_eps": 1e-05, "rope": True,
        "rope_full_precision": True, "rope_theta": 10000.0, "scale_logits": False, "torch_dtype": "float32",
        "use_cache": False, "vocab_size": vocab_size, "weight_tying": False,
    }  # fmt: skip


class RMSNorm(nn.Module):
    """A scale vector; the arithmetic is in `block_forward`, where the compiler can fuse it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE in half-split form."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


class Block(nn.Module):
    """One LLaDA block's parameters."""

    def __init__(self, config: dict) -> None:
        super().__init__()
        width, hidden = config["d_model"], config["mlp_hidden_size"]
        self.attn_norm, self.ff_norm = RMSNorm(width), RMSNorm(width)
        self.q_proj, self.k_proj = nn.Linear(width, width, False), nn.Linear(width, width, False)
        self.v_proj, self.attn_out = nn.Linear(width, width, False), nn.Linear(width, width, False)
        self.ff_proj, self.up_proj = nn.Linear(width, hidden, False), nn.Linear(width, hidden, False)
        self.ff_out = nn.Linear(hidden, width, False)

    def weights(self) -> tuple[Tensor, ...]:
        """In the order in which `block_forward` takes them."""
        return (
            self.attn_norm.weight, self.q_proj.weight, self.k_proj.weight, self.v_proj.weight, self.attn_out.weight,
            self.ff_norm.weight, self.ff_proj.weight, self.up_proj.weight, self.ff_out.weight,
        )  # fmt: skip


def block_forward(
    x: Tensor, cos: Tensor, sin: Tensor, heads: int, eps: float, product: torch.dtype, weights: tuple[Tensor, ...]
) -> Tensor:
    """One block as a function of its weights, so that one compiled graph serves every layer.

    Attention is written out: at these lengths it is faster on a CPU than the fused kernel and its backward.
    """
    norm1, wq, wk, wv, wo, norm2, wgate, wup, wdown = weights
    batch, length, width = x.shape

    def linear(value: Tensor, weight: Tensor) -> Tensor:
        return F.linear(value, weight.to(product))

    def split(value: Tensor) -> Tensor:
        return value.view(batch, length, heads, width // heads).transpose(1, 2)

    h = rms_norm(x, norm1, eps).to(product)
    query = rotate(split(linear(h, wq)).float(), cos, sin).to(product)
    key = rotate(split(linear(h, wk)).float(), cos, sin).to(product)
    scores = torch.matmul(query, key.transpose(-1, -2)).float() * (width // heads) ** -0.5
    mixed = torch.matmul(scores.softmax(-1).to(product), split(linear(h, wv)))
    x = x + linear(mixed.transpose(1, 2).reshape(batch, length, width), wo).float()
    h = rms_norm(x, norm2, eps).to(product)
    return x + linear(F.silu(linear(h, wgate)) * linear(h, wup), wdown).float()


class Transformer(nn.Module):
    """Embedding, blocks, final norm and LM head under the names of LLaDA's checkpoints."""

    def __init__(self, config: dict) -> None:
        super().__init__()
        width, vocab = config["d_model"], config["embedding_size"]
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(vocab, width),
                "blocks": nn.ModuleList(Block(config) for _ in range(config["n_layers"])),
                "ln_f": RMSNorm(width),
                "ff_out": nn.Linear(width, vocab, False),
            }
        )


class LLaDA(nn.Module):
    """Token ids in, logits out; `forward` can be asked for the logits of a few positions only."""

    def __init__(self, config: dict, bf16: bool = False, compiled: bool = False) -> None:
        super().__init__()
        self.config = config
        self.product = torch.bfloat16 if bf16 else torch.float32
        self.block_forward = torch.compile(block_forward, dynamic=False) if compiled else block_forward
        self.model = Transformer(config)
        head_dim = config["d_model"] // config["n_heads"]
        frequency = config["rope_theta"] ** (-torch.arange(0, head_dim, 2).float() / head_dim)
        angle = torch.outer(torch.arange(config["max_sequence_length"]).float(), frequency).repeat(1, 2)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def initialise(self, numbers: list[tuple[int, int]]) -> None:
        """Initial weights. `numbers` lists (token id, value): tokens of one value start alike, near values start near.

        Embeddings are of order one and every residual branch starts at zero, so token identity is not drowned; the head
        starts aligned with the embedding, so that copying a token is there from the start. Number tokens get the
        cosines and sines of their value at several periods, in which adding is a rotation: sums are then learned as a
        rule instead of one by one.
        """
        parts = self.model.transformer
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                zero = name.endswith(("attn_out.weight", "ff_out.weight"))
                nn.init.normal_(weight, std=0.0 if zero else 1 / math.sqrt(weight.shape[1]))
        embedding = parts["wte"].weight.data
        nn.init.normal_(embedding, std=0.5)
        values = torch.tensor([value for _, value in numbers]).float()
        ids = torch.tensor([token for token, _ in numbers])
        waves = [wave(2 * math.pi * values / period) for period in NUMBER_PERIODS for wave in (torch.cos, torch.sin)]
        per_value = torch.randn(int(values.max()) + 1, embedding.shape[1])[values.long()] * 0.35
        directions = torch.linalg.qr(torch.randn(embedding.shape[1], len(waves) + 1))[0].T
        smooth = torch.stack([*waves, torch.ones_like(values) * 3], 1) @ directions
        embedding[ids] = per_value + 1.1 * smooth + 0.1 * torch.randn(len(ids), embedding.shape[1])
        parts["ff_out"].weight.data.copy_(embedding * 0.15)

    def forward(self, ids: Tensor, positions: Tensor | None = None) -> Tensor:
        """Logits of every position, or of `positions` into the flattened batch."""
        config, parts, length = self.config, self.model.transformer, ids.shape[1]
        x = parts["wte"](ids)
        cos, sin = self.cos[:length], self.sin[:length]
        for block in parts["blocks"]:
            x = self.block_forward(
                x, cos, sin, config["n_heads"], config["rms_norm_eps"], self.product, block.weights()
            )
        if positions is not None:
            x = x.reshape(-1, x.shape[-1])[positions]
        x = rms_norm(x, parts["ln_f"].weight, config["rms_norm_eps"])
        return F.linear(x.to(self.product), parts["ff_out"].weight.to(self.product)).float()


def save_weights(state: dict[str, Tensor], config: dict, folder: Path) -> None:
    """Writes config.json and model.safetensors (fp32)."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.detach().float().contiguous().clone() for name, value in state.items()}
    partial = folder / "model.safetensors.part"
    save_file(tensors, partial, metadata={"format": "pt"})
    partial.replace(folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def load_model(folder: Path) -> LLaDA:
    """The model of a folder, in fp32 and ready for evaluation."""
    model = LLaDA(json.loads((folder / "config.json").read_text()))
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model.eval()

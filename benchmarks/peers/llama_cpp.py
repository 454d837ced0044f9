"""llama.cpp through llama-cpp-python's low-level API, on a GGUF made from the same weights.

Two architectures, with the same tensors:

    llada   as llama.cpp ships it: bidirectional and without a KV cache, so that every forward computes all positions
    llama   the same layers with llama.cpp's KV cache and causal attention switched off: what its kernels can do when a
            step computes some rows only. llama.cpp itself offers no such loop for LLaDA; here it has that of loop.py.
            Its cache takes new positions at the end only: prefix, but not dual.

BF16 files are written with the gguf package, the others are quantised from them by llama.cpp itself with its default
mixture (Q4_0 keeps a few tensors in more bits). Its memory-mapped weights are repacked where it knows a faster layout.
"""

import ctypes
import os
from pathlib import Path

import gguf
import llama_cpp as ll
import numpy as np
import torch

from .checkpoint import load_config, load_tensors
from .loop import LoopPeer

GGUF_NAMES = {
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "attn_out": "attn_output",
    "ff_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "ff_out": "ffn_down",
    "attn_norm": "attn_norm",
    "ff_norm": "ffn_norm",
}
WHOLE_MODEL = {
    "model.transformer.wte.weight": "token_embd.weight",
    "model.transformer.ln_f.weight": "output_norm.weight",
    "model.transformer.ff_out.weight": "output.weight",
}
FTYPES = {"Q8_0": ll.LLAMA_FTYPE_MOSTLY_Q8_0, "Q4_0": ll.LLAMA_FTYPE_MOSTLY_Q4_0}


def gguf_name(name: str) -> str:
    """LLaDA's name of a tensor -> GGUF's."""
    if name in WHOLE_MODEL:
        return WHOLE_MODEL[name]
    *_, layer, part, kind = name.split(".")  # model.transformer.blocks.3.q_proj.weight
    return f"blk.{layer}.{GGUF_NAMES[part]}.{kind}"


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of Q or K reordered from rotating (i, i + d/2) to rotating neighbours (2i, 2i + 1), which GGUF expects."""
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def write_gguf(folder: str, architecture: str, out: Path) -> None:
    """The checkpoint as BF16, its norms as F32; no tokenizer."""
    c = load_config(folder)
    w = gguf.GGUFWriter(str(out), architecture)
    w.add_vocab_size(c["embedding_size"])
    w.add_context_length(c["max_sequence_length"])
    w.add_embedding_length(c["d_model"])
    w.add_block_count(c["n_layers"])
    w.add_feed_forward_length(c["mlp_hidden_size"])
    w.add_head_count(c["n_heads"])
    w.add_head_count_kv(c["n_kv_heads"])
    w.add_rope_dimension_count(c["d_model"] // c["n_heads"])
    w.add_rope_freq_base(c["rope_theta"])
    w.add_layer_norm_rms_eps(c["rms_norm_eps"])
    w.add_causal_attention(False)
    w.add_tokenizer_model("no_vocab")
    w.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    for name, t in load_tensors(folder).items():
        heads = {"q_proj": c["n_heads"], "k_proj": c["n_kv_heads"]}.get(name.split(".")[-2])
        if t.ndim == 1:
            w.add_tensor(gguf_name(name), t.float().numpy())
        else:
            t = interleaved(t, heads) if heads else t
            bits = t.bfloat16().view(torch.uint16).numpy().view(np.uint8)
            w.add_tensor(gguf_name(name), bits, raw_dtype=gguf.GGMLQuantizationType.BF16)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def gguf_path(folder: str, architecture: str, kind: str, scratch: str) -> Path:
    return Path(scratch) / f"{Path(folder).name}-{architecture}-{kind}.gguf"


def prepare(folder: str, precision: str, scratch: str, kind: str, architecture: str) -> None:
    """Make the GGUF, and the BF16 one that it is quantised from, unless they are there."""
    out = gguf_path(folder, architecture, kind, scratch)
    if out.exists():
        return
    part = out.with_suffix(".part")
    if kind == "BF16":
        write_gguf(folder, architecture, part)
    else:
        prepare(folder, precision, scratch, "BF16", architecture)
        params = ll.llama_model_quantize_default_params()
        params.ftype = FTYPES[kind]
        source = gguf_path(folder, architecture, "BF16", scratch)
        if ll.llama_model_quantize(os.fsencode(source), os.fsencode(part), ctypes.byref(params)) != 0:
            raise RuntimeError(f"llama.cpp did not quantise {source} to {kind}")
    part.rename(out)


class Peer(LoopPeer):
    def __init__(self, folder: str, precision: str, threads: int, scratch: str, kind: str, architecture: str):
        torch.set_num_threads(threads)  # of the loop's argmax
        c = load_config(folder)
        self.mask_id, self.vocab_size = c["mask_token_id"], c["embedding_size"]
        self.threads = threads
        self.partial_rows = architecture == "llama"
        self.caches = ("none", "prefix") if self.partial_rows else ("none",)
        path = gguf_path(folder, architecture, kind, scratch)
        self.model = ll.llama_model_load_from_file(os.fsencode(path), ll.llama_model_default_params())
        if not self.model:
            raise RuntimeError(f"llama.cpp did not load {path}")
        self.context, self.capacity = None, 0

    def start(self, length):
        if length > self.capacity:
            self._new_context(length)
        elif self.partial_rows:
            ll.llama_memory_clear(ll.llama_get_memory(self.context), True)

    def _new_context(self, length):
        if self.context:
            ll.llama_batch_free(self.batch)
            ll.llama_free(self.context)
        params = ll.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = length  # a bidirectional step is one micro-batch
        params.n_threads = params.n_threads_batch = self.threads
        self.context = ll.llama_init_from_model(self.model, params)
        if not self.context:
            raise RuntimeError(f"llama.cpp made no context for {length} positions")
        ll.llama_set_causal_attn(self.context, False)
        self.batch = ll.llama_batch_init(length, 0, 1)
        self.capacity = length

    def logits(self, tokens, begin, end, wanted):
        rows, batch = end - begin, self.batch
        np.ctypeslib.as_array(batch.token, (rows,))[:] = tokens[begin:end].numpy()
        np.ctypeslib.as_array(batch.pos, (rows,))[:] = np.arange(begin, end)
        np.ctypeslib.as_array(batch.n_seq_id, (rows,))[:] = 1
        flags = np.ctypeslib.as_array(batch.logits, (rows,))
        flags[:] = 0
        flags[wanted.numpy()] = 1
        for i in range(rows):
            batch.seq_id[i][0] = 0
        batch.n_tokens = rows
        if self.partial_rows:
            ll.llama_memory_seq_rm(ll.llama_get_memory(self.context), 0, begin, -1)
        if (code := ll.llama_decode(self.context, batch)) != 0:
            raise RuntimeError(f"llama_decode returned {code}")
        out_rows = len(wanted) if self.partial_rows else rows  # without a cache it insists on the logits of all rows
        out = np.ctypeslib.as_array(ll.llama_get_logits(self.context), (out_rows, self.vocab_size))
        return torch.from_numpy(out) if self.partial_rows else torch.from_numpy(out)[wanted]

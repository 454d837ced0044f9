"""The native module, csrc/bindings. Use it through dllm_ext.Engine; only StepEvent is part of the public API.

Everything here raises the classes of dllm_ext.errors.
"""

from collections.abc import Callable
from typing import Any, TypedDict

import numpy as np

class Info(TypedDict):
    isa: str
    """Instruction set in use: "portable", "avx2", "avx512", "avx512_vnni" or "avx512_bf16". The environment's
    DLLM_ISA lowers it."""
    isas: list[str]
    """What this CPU can run, slowest first."""
    threads: int
    """torch's own number of threads: torch.set_num_threads()."""

class ModelSpec:
    """The shape and special ids of a model."""

    @staticmethod
    def from_config(json_text: str) -> ModelSpec: ...
    family: str
    """"llada" or "dream"."""
    vocab_size: int
    """Rows of the embedding, which may be more than the tokenizer has ids."""
    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    mlp_hidden: int
    max_positions: int
    """Most positions that a prompt and what is generated may have together."""
    norm_eps: float
    rope_theta: float
    rope_full_precision: bool
    qkv_bias: bool
    tied_head: bool
    logit_shift: bool
    """Token i is read from the hidden state of position i - 1 (Dream)."""
    mask_id: int
    eos_id: int
    stop_ids: list[int]
    """EOS, then end-of-turn ids."""
    def tensors(self) -> list[tuple[str, list[int]]]:
        """(name in the checkpoint, shape) of every tensor that the model reads."""

class Checkpoint:
    """A folder with config.json and safetensors, mapped into memory. CheckpointError where it is not one."""

    def __init__(self, folder: str | bytes) -> None: ...
    config_text: bytes
    """config.json as it is."""
    def tensor(self, name: str, shape: list[int]) -> np.ndarray:
        """A tensor in float32, or in bfloat16 as uint16, read-only. It stays in its mapped file, which the array keeps.

        CheckpointError where it is missing, or has another shape or dtype.
        """
    def release(self, name: str, shape: list[int]) -> None:
        """Let go of the memory that a tensor's pages take; its arrays stay valid and read the file again."""

class StepEvent:
    """What one step of one sequence did; given to generate()'s on_step."""

    sequence: int
    """Index of the prompt."""
    step: int
    """From 0, counted over the whole sequence."""
    block: int
    """From 0."""
    positions: list[int]
    """Positions committed by this step, ascending; position 0 is the prompt's first token."""
    token_ids: list[int]
    """Their tokens."""
    confidences: list[float]
    """What they were ranked by, before the transforms of `sigma`, `token_frequencies` and `position_decay`. remasking
    "low_confidence", and "origin", which ranks by nothing: the token's probability, without noise, after guidance and
    filters (and, schedule "dream", temperature). "topk_margin": p1 - p2; "entropy": -H in nats, at most 0; "random":
    the random number. 0 for a stop id under confidence_eos_eot_inf."""
    rows: int
    """Positions computed for this sequence."""
    computed: list[int]
    """These positions, ascending. dLLM-Cache carries some of them past most layers."""
    is_full: bool
    """Whether that was all of them."""

class StatsDict(TypedDict):
    """See dllm_ext.Stats. The lists have one entry per step."""

    rows: list[int]
    layer_rows: list[int]
    verify_rows: list[int]
    logit_rows: list[int]
    attention_pairs: list[int]
    weight_bytes: list[int]
    commits: list[int]
    buffer_bytes: list[int]
    seconds: list[float]
    selection_seconds: list[float]
    seconds_total: float
    seconds_first_block: float

class Result:
    token_ids: list[int]
    prompt_ids: list[int]
    commit_steps: list[int]
    nfe: int
    stats: StatsDict

class Engine:
    def __init__(
        self,
        folder: str | bytes,
        dtype: str,
        quantization: str | None = None,
        progress: Callable[[int, int], None] | None = None,
        device: str = "cpu",
    ) -> None:
        """folder: config.json and safetensors. dtype: "float32", "bfloat16", or on CUDA "float16". quantization: "int8"
        or "int4", or None: as the checkpoint is. progress: gets bytes done and in all. device: "cpu" or "cuda"."""
    spec: ModelSpec
    device: str
    dtype: str
    quantization: str | None
    weight_bytes: int
    unused_tensors: list[str]
    """Tensors of the checkpoint that this architecture has no use for."""
    def generate(
        self,
        prompts: list[list[int]],
        infill: bool,
        config: dict[str, Any],
        batch_size: int,
        on_step: Callable[[StepEvent], bool | None] | None = None,
    ) -> list[Result]:
        """config: what dllm_ext.config.native_fields gives; a missing field or None means "not given".

        The GIL is released.
        """
    def log_probs(self, sequences: list[list[int]], hidden: list[list[int]]) -> list[list[float]]:
        """See dllm_ext.Engine.log_probs. The GIL is released."""

def quantize(weight: np.ndarray, format: str, name: str = "weight") -> tuple[np.ndarray, np.ndarray]:
    """(values, scales) of a matrix [n, k], float32 or bfloat16 as uint16, whose rows are contiguous.

    format: "int8" gives int8 [n, k] and float32 [n]; "int4" gives uint8 [n, ceil(k / 2)], even terms in the low halves,
    and bfloat16 as uint16 [n, ceil(k / 64)]. CheckpointError, which names `name`, where an element is not finite.
    The GIL is released.
    """

def info() -> Info: ...
def set_isa(name: str) -> None:
    """One of info()["isas"], or "auto"."""

def validate_config(config: dict[str, Any]) -> dict[str, Any]:
    """All fields, with the defaults that are in force filled in; ConfigError if they are not allowed.

    The settings of a cache stand beside its name, as in dllm_ext.config.native_fields. token_frequencies is a numpy
    array of float64, always_refresh_layers a tuple.
    """

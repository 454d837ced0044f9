"""Engine: a model and its tokenizer. The denoising loop itself is native (csrc/engine/engine.h)."""

import dataclasses
import functools
import operator
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from . import _C, _build_info
from .checks import check_bool, check_int
from .config import GenerationConfig, native_fields
from .errors import ConfigError, InputError
from .hub import model_folder
from .progress import progress_bar
from .tokenizer import Tokenizer

Prompt = str | list[int] | list[dict]


@dataclass(frozen=True)
class Stats:
    """What one generation cost. Lists have one entry per step of this sequence.

    Sequences that run in one batch share their steps: `seconds` and `weight_bytes` are those of the whole step, and
    `seconds_total` runs from this sequence's first step to its last.
    """

    tokens: int
    """Generated tokens before the first stop id: what `text` was made of."""
    nfe: int
    """Model evaluations, full or partial, each 1; guidance counts its second pass."""
    seconds_total: float
    time_to_first_block: float
    """Seconds until the first block was committed."""
    rows: list[int] = field(repr=False)
    """Positions that went through the layers, or (dLLM-Cache) were carried past some of them."""
    layer_rows: list[int] = field(repr=False)
    """Rows that a layer computed, summed over layers: n_layers * rows, but for dLLM-Cache."""
    verify_rows: list[int] = field(repr=False)
    """Rows of which a layer computed V only, to compare it with the cached one, summed over layers (dLLM-Cache)."""
    logit_rows: list[int] = field(repr=False)
    """Positions that went through the LM head."""
    attention_pairs: list[int] = field(repr=False)
    """Query rows x keys, summed over layers."""
    weight_bytes: list[int] = field(repr=False)
    """Bytes of weights read."""
    commits: list[int] = field(repr=False)
    """Positions committed."""
    buffer_bytes: list[int] = field(repr=False)
    """Bytes newly taken for slabs and scratch, by the whole process: 0 but for a sequence's first step, and where a
    thread first gets some kind of work (its own scratch, kept from then on)."""
    seconds: list[float] = field(repr=False)
    """Wall seconds."""
    selection_seconds: list[float] = field(repr=False)
    """Of these, spent on choosing rows for this sequence: densities, attention rollout, similarities, sorting."""

    @property
    def tokens_per_second(self) -> float:
        """`tokens` / `seconds_total`: prompt and padding never count, an empty answer is 0."""
        return self.tokens / self.seconds_total if self.seconds_total > 0 else 0.0

    @property
    def tokens_per_forward(self) -> float:
        """`tokens` / `nfe`."""
        return self.tokens / self.nfe if self.nfe else 0.0

    @property
    def ms_per_forward(self) -> float:
        """Milliseconds of the steps / `nfe`."""
        return 1e3 * sum(self.seconds) / self.nfe if self.nfe else 0.0


@dataclass(frozen=True)
class Result:
    """One generated sequence."""

    text: str | None
    """The generated text up to the first stop id, without special tokens. None if the model has no tokenizer files."""
    token_ids: list[int] = field(repr=False)
    """All `gen_length` generated ids. With stop_at_eos, EOS from the first stop id on."""
    prompt_ids: list[int] = field(repr=False)
    """The prompt's ids, with infilled positions filled."""
    nfe: int
    """Model evaluations, full or partial, each 1."""
    stats: Stats
    commit_steps: list[int] = field(repr=False)
    """Per generated position the step that committed it; -1 where it was filled with EOS after the stop."""

    def to_dict(self) -> dict:
        """All of it as plain values, for JSON; the stats with their ratios."""
        result = dataclasses.asdict(self)
        for ratio in ("tokens_per_second", "tokens_per_forward", "ms_per_forward"):
            result["stats"][ratio] = getattr(self.stats, ratio)
        return result


class Engine:
    """A masked-diffusion language model, ready to generate. Make one with `Engine.from_pretrained`.

    Attributes:
        folder: Where its files are (Path).
        spec: Its shape and special ids (family, vocab_size, d_model, n_layers, n_heads, n_kv_heads, head_dim,
            mlp_hidden, max_positions, mask_id, eos_id, stop_ids, logit_shift).
        device: "cpu" or "cuda".
        dtype: "float32", "bfloat16", or on CUDA "float16".
        quantization: None, "int8" or "int4".
        weight_bytes: Bytes of its weights in memory; an embedding table that stays in its mapped file does not count.
    """

    def __init__(self, native: _C.Engine, folder: Path):
        """For `from_pretrained`."""
        self._native = native
        self.folder = folder
        self.spec = native.spec
        self.device = native.device
        self.dtype = native.dtype
        self.quantization = native.quantization
        self.weight_bytes = native.weight_bytes

    @classmethod
    def from_pretrained(
        cls,
        path_or_repo: str | os.PathLike,
        device: str = "auto",
        dtype: str = "auto",
        quantization: str | None = None,
        revision: str | None = None,
    ) -> "Engine":
        """Load a LLaDA or Dream model.

        path_or_repo: "mini-llada" (bundled, 3 million parameters, for trying things out), a folder with config.json
            and safetensors, or a Hugging Face id (downloaded once; never runs code, never unpickles).
        device: "cpu", "cuda" (torch's current CUDA device), or "auto": cuda where this build has CUDA and torch sees a
            GPU, else cpu. The CUDA code has never run on a GPU yet: it was verified in an emulator (docs/cuda.md).
        dtype: "float32", "bfloat16", "float16" (CUDA only), or "auto": bfloat16 where the weights are stored in it and
            the device multiplies in it (a CPU with AVX-512-BF16, any GPU), else float32, which is exact but takes twice
            the memory.
        quantization: "int8" (W8A8: 8-bit weights, one scale per output channel), "int4" (W4A8: 4.25 bits per weight,
            one scale per 64 of a row; the LM head in 8 bits), or None: as the checkpoint is. Activations are quantised
            row by row to 8 bits before each linear layer; attention, norms and the KV cache keep `dtype`. A checkpoint
            that `dllm quantize` wrote is loaded as it is, anything else is quantised while it loads.
        revision: branch, tag or commit of a Hugging Face id.

        Raises ConfigError for a wrong argument, CheckpointError for a model that cannot be loaded, OutOfMemoryError.
        """
        device = _resolve_device(device)
        if quantization not in (None, "int8", "int4"):
            raise ConfigError(f'quantization = {quantization!r} is not allowed: it must be None, "int8" or "int4"')
        name = str(dtype).removeprefix("torch.")
        if name not in ("auto", *_DTYPES[device]):
            allowed = ", ".join(f'"{d}"' for d in _DTYPES[device])
            raise ConfigError(f'dtype = {dtype!r} is not allowed on device "{device}": it must be "auto", {allowed}')
        folder = model_folder(path_or_repo, revision)
        with progress_bar(f"loading {folder.name}") as progress:
            dtype = _auto_dtype(folder, device) if name == "auto" else name
            native = _C.Engine(os.fsencode(folder), dtype, quantization, progress, device)
        return cls(native, folder)

    def __repr__(self):
        precision = f"{self.dtype}, {self.quantization}" if self.quantization else self.dtype
        return f"Engine({str(self.folder)!r}, {self.spec.family}, {self.device}, {precision})"

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer, read when first needed. InputError where the folder has none."""
        if not Tokenizer.is_in(self.folder):
            raise InputError(f"the model in {self.folder} has no tokenizer files: give token ids instead of text")
        return Tokenizer(self.folder, self.spec.family, self.spec.vocab_size, self.spec.stop_ids)

    def generate(
        self,
        prompt: Prompt | list[Prompt],
        config: GenerationConfig | None = None,
        *,
        infill: bool = False,
        chat: bool | None = None,
        batch_size: int = 8,
        on_step: Callable[[_C.StepEvent], bool | None] | None = None,
        **fields,
    ) -> Result | list[Result]:
        """Generate one Result, or for a list of prompts a list of Results in the same order ([] for []).

        prompt: a text, token ids (list or array of integers; needs no tokenizer), chat messages
            ([{"role": "user", "content": "..."}, ...]), or a list of any of these.
        config: how to decode; None is GenerationConfig(). `fields` override single fields of it.
        infill: fill the positions of the prompt that hold the mask token, too. Otherwise a mask token there is data.
        chat: whether a text is one user message of a chat (True), or taken as it stands (False). None: a chat if the
            model's files declare a chat template and infill is off. Some base models declare one as well: say False.
        batch_size: sequences that run at a time, at least 1. No result depends on it, but for reference_quirks with a
            d2 cache.
        on_step: called after every step of every sequence with a StepEvent; returning False stops the whole call,
            which then raises Interrupted. What it raises comes out of generate().

        Raises ConfigError, InputError, NumericalError (NaN or infinity in the model), OutOfMemoryError, Interrupted,
        and UsageError where on_step calls generate(). Afterwards the engine can be used again.
        """
        config = self._config(config, fields)
        infill = check_bool("infill", infill)
        if chat is not None:
            chat = check_bool("chat", chat)
        batch_size = check_int("batch_size", batch_size)
        if on_step is not None and not callable(on_step):
            raise ConfigError(f"on_step = {on_step!r} is not allowed: it must be a function or None")

        prompts, single = _as_list(prompt)
        if chat is None and infill:
            chat = False
        ids = [self._encode(i, p, chat) for i, p in enumerate(prompts)]
        tokenizer = self.tokenizer if Tokenizer.is_in(self.folder) else None  # a damaged one fails now, not at the end
        native = self._native.generate(ids, infill, native_fields(config), batch_size, on_step)
        results = [self._result(r, tokenizer) for r in native]
        return results[0] if single else results

    def log_probs(self, sequences: list[list[int]], hidden: list[list[int]]) -> list[list[float]]:
        """Natural logarithms of the probabilities of hidden tokens: a list for each sequence, in the order of `hidden`.

        sequences: token ids, whole. hidden: for each sequence, ascending positions of it. The model sees the mask at
        all of them at once, and every other token. The softmax is over the whole vocabulary, in double precision.

        Each sequence is one forward and takes len(hidden) x vocab_size x 4 bytes. Raises InputError, and NumericalError
        (NaN or infinity in the model).
        """
        ids = [[self._check_id(i, p, token) for p, token in enumerate(s)] for i, s in enumerate(sequences)]
        return self._native.log_probs(ids, [list(h) for h in hidden])

    def _config(self, config, fields):
        if config is None:
            return GenerationConfig(**fields)
        if not isinstance(config, GenerationConfig):
            raise ConfigError(f"config = {config!r} is not allowed: it must be a GenerationConfig or None")
        return dataclasses.replace(config, **fields)

    def encode(self, prompt: Prompt, chat: bool | None = None) -> list[int]:
        """Token ids of one prompt, as generate() sees it; `chat` as there. InputError if it is not a prompt."""
        return self._encode(0, prompt, chat if chat is None else check_bool("chat", chat))

    def _encode(self, index, prompt, chat):
        """encode(); an error calls the prompt by its index."""
        if isinstance(prompt, str):
            if chat is None:
                chat = self.tokenizer.has_chat_template
            if chat:
                return self.tokenizer.encode_chat([{"role": "user", "content": prompt}])
            return self.tokenizer.encode(prompt)
        if _is_array(prompt):
            prompt = prompt.tolist()
        if not isinstance(prompt, list | tuple):
            raise InputError(
                f"prompt {index} is {prompt!r} ({type(prompt).__name__}); it must be a text, token ids or chat messages"
            )
        if any(isinstance(p, dict) for p in prompt):
            return self.tokenizer.encode_chat(list(prompt))
        return [self._check_id(index, position, token) for position, token in enumerate(prompt)]

    def _check_id(self, index, position, token):
        try:
            if isinstance(token, bool):
                raise TypeError
            token = operator.index(token)
        except TypeError:
            message = f"prompt {index} holds {token!r} at position {position}; a token id is an integer"
            raise InputError(message) from None
        if not 0 <= token < self.spec.vocab_size:
            raise InputError(
                f"prompt {index} holds the id {token} at position {position}; ids must be between 0 and "
                f"{self.spec.vocab_size - 1}"
            )
        return token

    def _result(self, r, tokenizer):
        native_stats = r.stats
        ids, stop_ids = r.token_ids, self.spec.stop_ids  # each access makes a new list
        tokens = next((i for i, t in enumerate(ids) if t in stop_ids), len(ids))
        stats = Stats(
            tokens=tokens,
            nfe=r.nfe,
            seconds_total=native_stats.pop("seconds_total"),
            time_to_first_block=native_stats.pop("seconds_first_block"),
            **native_stats,
        )
        return Result(
            text=tokenizer.decode(ids) if tokenizer else None,
            token_ids=ids,
            prompt_ids=r.prompt_ids,
            nfe=r.nfe,
            stats=stats,
            commit_steps=r.commit_steps,
        )


def _is_array(x):
    return getattr(x, "ndim", 0) > 0 and hasattr(x, "tolist")


def _as_list(prompt):
    """(list of prompts, whether `prompt` was a single one). A list of lists, texts or arrays holds several."""
    if _is_array(prompt):
        prompt = prompt.tolist()
    several = isinstance(prompt, list | tuple) and (
        not prompt or any(isinstance(p, str | list | tuple) or _is_array(p) for p in prompt)
    )
    return (list(prompt), False) if several else ([prompt], True)


_DTYPES = {"cpu": ("float32", "bfloat16"), "cuda": ("float32", "bfloat16", "float16")}


def _resolve_device(device):
    name = str(device)
    if name not in ("auto", "cpu", "cuda"):
        raise ConfigError(
            f'device = "{device}" is not allowed: it must be "auto", "cpu" or "cuda" '
            "(which is torch's current CUDA device: torch.cuda.set_device or CUDA_VISIBLE_DEVICES choose it)"
        )
    if name == "auto":
        return "cuda" if _build_info.CUDA and torch.cuda.is_available() else "cpu"
    if name == "cuda" and not _build_info.CUDA:
        raise ConfigError(f'device = "cuda" is not available: CUDA was {_build_info.CUDA_REASON}; use "cpu" or "auto"')
    return name


def _auto_dtype(folder, device):
    from safetensors import SafetensorError, safe_open

    if device == "cpu" and "bf16" not in _C.info()["isa"]:
        return "float32"
    for file in sorted(folder.glob("model*.safetensors"))[:1]:
        try:
            with safe_open(file, "pt") as f:
                names = [n for n in f.keys() if not n.endswith("_scale")]  # noqa: SIM118  (no dict)
                stored = {f.get_slice(name).get_dtype() for name in names} - {"I8", "U8"}
        except (OSError, SafetensorError):  # the native loader will say what is wrong with it
            break
        return "bfloat16" if stored == {"BF16"} else "float32"
    return "float32"

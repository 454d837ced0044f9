"""GenerationConfig: how a generation is decoded, and the caches it can use.

Python checks the types; the native code (csrc/decode/config.cpp) checks ranges and combinations, for Python and C++
alike. Both happen when a GenerationConfig is made, so a wrong setting never waits for a model to load.
"""

import dataclasses
import functools
import numbers
import operator
import re
import types
import typing
from dataclasses import dataclass

import numpy

from . import _C
from .errors import ConfigError


@dataclass(frozen=True)
class NoCache:
    """Recompute every position at every step: exact, and slow."""

    name: typing.ClassVar[str] = "none"


@dataclass(frozen=True)
class DualCache:
    """Within a block, recompute the block only; K and V of everything else date from the block's first step.

    Source: Fast-dLLM (arXiv 2505.22618), DualCache. `cache="dual"` is the same.
    """

    name: typing.ClassVar[str] = "dual"


@dataclass(frozen=True)
class PrefixCache:
    """Within a block, recompute the block and everything right of it; K and V left of it date from its first step.

    Source: Fast-dLLM (arXiv 2505.22618). `cache="prefix"` is the same.

    use_dual: keep what is right of the block as well, which is DualCache.
    """

    use_dual: bool = False

    @property
    def name(self) -> str:
        return DualCache.name if self.use_dual else "prefix"


Cache = NoCache | PrefixCache | DualCache


def _checked_init(cls):
    """Let the constructor of a dataclass raise a ConfigError, which lists the fields, where Python has a TypeError."""
    init = cls.__init__

    @functools.wraps(init)
    def __init__(self, *args, **fields):
        names = [f.name for f in dataclasses.fields(cls)]
        if args:
            raise ConfigError(
                f"{cls.__name__} takes keyword arguments only, not {args[0]!r} (fields: {', '.join(names)})"
            )
        unknown = [name for name in fields if name not in names]
        if unknown:
            raise ConfigError(f"{unknown[0]!r} is not a field of {cls.__name__} (fields: {', '.join(names)})")
        init(self, **fields)

    cls.__init__ = __init__
    return cls


@_checked_init
@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """How one generation is decoded. Immutable; `dataclasses.replace` makes a changed copy.

    The defaults serve a user: prefix cache, blocks of 32, parallel decoding at threshold 0.9, stop at the end of the
    text. `GenerationConfig.reference()` is LLaDA's own plain loop. steps, threshold and factor exclude each other.

    A wrong type, value or combination raises ConfigError.

    Attributes:
        gen_length: Number of tokens to generate; `token_ids` always has this many. 0 only where a prompt is infilled.
        block_length: Tokens per block. Blocks are finished from left to right (semi-autoregressive decoding, LLaDA,
            arXiv 2502.09992); the last one may be shorter.
        steps: Denoising steps in all, a multiple of the number of blocks: how many tokens a step commits then follows
            `schedule` (LLaDA, Dream). Excludes threshold and factor.
        num_transfer_tokens: Tokens committed per step. Beside steps, threshold or factor it is the least number per
            step (Kamichanw/d2Cache).
        temperature: 0 takes the most likely token. Otherwise Gumbel noise of this strength is added to the logits
            (LLaDA), or the logits are divided by it and sampled (schedule "dream").
        top_p: Sample among the most likely tokens that hold this probability together, in (0, 1] (Dream).
        top_k: Sample among this many most likely tokens (Dream).
        remasking: What ranks the positions. "low_confidence": probability of the chosen token (LLaDA; Dream's
            maskgit_plus). "topk_margin": best minus second-best probability (Dream). "entropy": negative entropy
            (Dream). "random": uniform (LLaDA). "origin": each position transfers by itself, with Dream's probability
            1 - s/t.
        schedule: How `steps` are spread over a block: "llada" evenly, "dream" by time steps from 1 to eps. It also
            says where temperature acts.
        eps: Last time step of the "dream" schedule, in (0, 1).
        alg_temp: Draw the positions at random, by confidence at this temperature, instead of taking the best (Dream).
        threshold: Commit every position of the block with at least this confidence, and always the best one
            (Fast-dLLM, arXiv 2505.22618). Default: 0.9, unless steps, factor or num_transfer_tokens is given.
        factor: Commit the n best positions for the largest n with (n + 1)(1 - confidence of the n-th) < factor
            (Fast-dLLM, arXiv 2505.22618).
        cfg_scale: Classifier-free guidance against the model without the prompt; 0 is off, else every step costs two
            forwards (LLaDA).
        logits_eos_inf: Never choose the end-of-text token (LLaDA).
        confidence_eos_eot_inf: Commit end-of-text and end-of-turn tokens last (LLaDA).
        stop_at_eos: Stop once everything before the first stop id is committed, and fill the rest with EOS
            (stop_until_eos in Kamichanw/d2Cache). False generates every position.
        seed: Of all randomness, 0 to 2**64 - 1. Equal seeds give equal tokens whatever the batch or the threads
            (Philox, Salmon et al. 2011).
        cache: Which positions a step recomputes: "none", "prefix" or "dual", or NoCache(), PrefixCache(), DualCache()
            (Fast-dLLM, arXiv 2505.22618).
    """

    gen_length: int = 128
    block_length: int = 32
    steps: int | None = None
    num_transfer_tokens: int | None = None
    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    remasking: str = "low_confidence"
    schedule: str = "llada"
    eps: float = 1e-3
    alg_temp: float | None = None
    threshold: float | None = None
    factor: float | None = None
    cfg_scale: float = 0.0
    logits_eos_inf: bool = False
    confidence_eos_eot_inf: bool = False
    stop_at_eos: bool = True
    seed: int = 0
    cache: str | Cache = "prefix"

    def __post_init__(self):
        for name, (kind, optional) in _KINDS.items():
            value = getattr(self, name)
            if not (value is None and optional):
                check = _check_cache if name == "cache" else _CHECKS[kind]
                object.__setattr__(self, name, check(name, value))
        _C.validate_config(dataclasses.asdict(self))

    @classmethod
    def reference(cls, **fields) -> "GenerationConfig":
        """LLaDA's plain loop (ML-GSAI/LLaDA, generate.py): one block, one token per step, no cache, no early stop.

        `fields` override, e.g. `GenerationConfig.reference(gen_length=256, block_length=32)`. Where they do not say
        otherwise, block_length and steps are gen_length; steps is left out if another rule is given.
        """
        length = fields.get("gen_length", cls.gen_length)
        defaults = {"gen_length": length, "block_length": length, "stop_at_eos": False, "cache": NoCache.name}
        if not any(fields.get(name) is not None for name in ("threshold", "factor", "num_transfer_tokens")):
            defaults["steps"] = length
        return cls(**(defaults | fields))


def field_docs() -> dict[str, str]:
    """Name -> description of every field of GenerationConfig, from its docstring ({} under python -OO)."""
    attributes = (GenerationConfig.__doc__ or "").partition("Attributes:\n")[2]
    parts = re.split(r"^ {8}(\w+): ", attributes, flags=re.MULTILINE)[1:]
    return {name: " ".join(text.split()) for name, text in zip(parts[::2], parts[1::2], strict=True)}


def field_kinds() -> dict[str, tuple[type, bool]]:
    """Name -> (type, whether None is allowed) of every field of GenerationConfig; `cache` counts as a str."""
    return dict(_KINDS)


def _wrong_type(name, value, allowed):
    return ConfigError(f"{name} = {value!r} is not allowed: it must be {allowed}, not {type(value).__name__}")


def check_int(name, value):
    """`value` as an int, from any integer type but bool; ConfigError unless it fits the native field."""
    try:
        if isinstance(value, bool):
            raise TypeError
        value = operator.index(value)
    except TypeError:
        raise _wrong_type(name, value, "an integer") from None
    low, high = (0, 2**64 - 1) if name == "seed" else (-(2**63), 2**63 - 1)
    if not low <= value <= high:
        raise ConfigError(f"{name} = {value} is not allowed: it must be between {low} and {high}")
    return value


def _check_float(name, value):
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise _wrong_type(name, value, "a number")
    try:
        return float(value)
    except OverflowError:
        raise ConfigError(f"{name} = {value!r} is not allowed: it is too large") from None


def check_bool(name, value):
    """`value` as a bool, from Python's or numpy's; ConfigError for anything else."""
    if isinstance(value, bool | numpy.bool_):
        return bool(value)
    raise _wrong_type(name, value, "True or False")


def _check_str(name, value):
    if not isinstance(value, str):
        raise _wrong_type(name, value, "a name")
    return value


def _check_cache(name, value):
    if isinstance(value, PrefixCache):
        check_bool("PrefixCache.use_dual", value.use_dual)
    if isinstance(value, Cache):
        return value.name
    if not isinstance(value, str):
        raise _wrong_type(name, value, "a name, NoCache(), PrefixCache() or DualCache()")
    return value


_CHECKS = {int: check_int, float: _check_float, bool: check_bool, str: _check_str}


def _kind(hint):
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return options[0], type(None) in options


_KINDS = {name: _kind(hint) for name, hint in typing.get_type_hints(GenerationConfig).items()}

"""GenerationConfig: how a generation is decoded, and the caches it can use.

Python checks the types; the native code (csrc/decode/config.cpp) checks ranges and combinations, for Python and C++
alike. Both happen when a GenerationConfig is made, so a wrong setting never waits for a model to load.
"""

import dataclasses
import re
import reprlib
import typing
from dataclasses import dataclass

from . import _C
from .checks import CHECKS, check_bool, check_fields, checked_init, kinds_of, wrong_type
from .errors import ConfigError
from .frequencies import TokenFrequencies


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


@checked_init
@dataclass(frozen=True, kw_only=True)
class DLLMCache:
    """Refresh prompt and response at their own intervals, and in between only what changed most: every layer by itself.

    The response is what the generation decides, the prompt everything else. Beside K and V, the outputs of attention
    and of the MLP are kept: 2 x n_layers x d_model more elements of the model's dtype per position, twice that with
    guidance. Source: dLLM-Cache (arXiv 2506.06295). `cache="dllm"` is `DLLMCache()`.

    Attributes:
        kp: Steps from one refresh of the prompt to the next, at least 1.
        kr: Steps from one refresh of the response to the next, at least 1.
        rou: Share of the response, in [0, 1], that is recomputed in between: the positions whose V resembles the kept
            one least. 0 recomputes nothing and saves the comparison.
        always_refresh_layers: Layers, counted from 0, that recompute every position at every step.
        cfg_interval_steps: Steps from one evaluation of guidance's second pass to the next, at least 1; the first five
            steps always have it, and in between the last difference of the logits is used. Needs cfg_scale. Above 1 it
            keeps 4 x vocab_size bytes per masked position.
    """

    name: typing.ClassVar[str] = "dllm"
    kp: int = 50
    kr: int = 2
    rou: float = 0.25
    always_refresh_layers: tuple[int, ...] = (0,)
    cfg_interval_steps: int = 1

    def __post_init__(self):
        check_fields(self, "DLLMCache.")


@checked_init
@dataclass(frozen=True, kw_only=True)
class D2Cache:
    """Recompute the masked positions that will be decided next, and what attention leans on; the rest stays.

    After the first step no step computes all positions. Attention of a step is kept until its end: 4 x n_layers x rows
    x positions bytes, so for the first one 4 x n_layers x positions^2. Source: d2Cache (arXiv 2509.23094).
    `cache="d2"` is `D2Cache()`.

    Attributes:
        rollout_p: Of the positions that nothing else asks for, those that hold this share of attention's importance
            (rollout over the layers) together are recomputed, in [0, 1]; always the first, and all of them at 1.
        current_k: Masked positions computed per step, at least 1, by the certainty of their neighbourhood.
        sigma: Width of that neighbourhood, in positions, above 0. Also the `sigma` of GenerationConfig where that is
            None and tokens are committed by number. "d2_sigma" on the command line and in native messages.
        inflate_w: Between two computed positions at most this far apart, those in the middle are computed as well; 0
            is off.
    """

    name: typing.ClassVar[str] = "d2"
    rollout_p: float = 0.1
    current_k: int = 32
    sigma: float = dataclasses.field(default=10.0, metadata={"native": "d2_sigma"})
    inflate_w: int = 4

    def __post_init__(self):
        check_fields(self, "D2Cache.")


Cache = NoCache | PrefixCache | DualCache | DLLMCache | D2Cache
CACHES_WITH_SETTINGS = (DLLMCache, D2Cache)


@checked_init
@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """How one generation is decoded. Immutable; `dataclasses.replace` makes a changed copy.

    The defaults serve a user: prefix cache, blocks of 32, parallel decoding at threshold 0.9, stop at the end of the
    text. `GenerationConfig.reference()` is LLaDA's own plain loop. steps, threshold, factor and gamma exclude each
    other.

    A wrong type, value or combination raises ConfigError.

    Attributes:
        gen_length: Number of tokens to generate; `token_ids` always has this many. 0 only where a prompt is infilled.
        block_length: Tokens per block. Blocks are finished from left to right (semi-autoregressive decoding, LLaDA,
            arXiv 2502.09992); the last one may be shorter.
        steps: Denoising steps in all, a multiple of the number of blocks: how many tokens a step commits then follows
            `schedule` (LLaDA, Dream). Excludes threshold, factor and gamma.
        num_transfer_tokens: Tokens committed per step. Beside another rule it is the least number per step
            (Kamichanw/d2Cache).
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
            (Fast-dLLM, arXiv 2505.22618). Default: 0.9, unless steps, factor, gamma or num_transfer_tokens is given.
        factor: Commit the n best positions for the largest n with (n + 1)(1 - confidence of the n-th) < factor
            (Fast-dLLM, arXiv 2505.22618).
        gamma: Commit the best positions as long as their entropies, in nats and without the largest, sum to at most
            this (EB-sampler, arXiv 2505.24857).
        kl_threshold: Choose only among positions whose distribution moved by less than this, in nats of KL divergence,
            at each of the last kl_history_length times it was computed (KLASS, arXiv 2511.05664). Goes before
            threshold or factor. Keeps 4 x vocab_size bytes per masked position.
        kl_history_length: How many times in a row kl_threshold looks at, 1 to 64 (KLASS).
        sigma: Prefer positions whose neighbourhood is decided: confidences are weighted by a Gaussian of this width,
            in positions, over what is known; 0 is off (d2Cache, arXiv 2509.23094). Default: the sigma of a d2 cache
            where steps or num_transfer_tokens alone decides how many tokens are committed, else off.
        token_frequencies: Weight confidences by how rare the token is in a corpus, so that frequent ones do not come
            first (PC-Sampler, arXiv 2508.13021).
        clip_alpha: Upper limit of confidences that token_frequencies weighted (PC-Sampler).
        position_decay: Weight confidences by exp(-position_decay * i), i from the block's first position; 0 is off
            (PC-Sampler).
        autoregressive: Commit from left to right: nothing before its left neighbour (Kamichanw/d2Cache).
        cfg_scale: Classifier-free guidance against the model without the prompt; 0 is off, else every step costs two
            forwards (LLaDA).
        logits_eos_inf: Never choose the end-of-text token (LLaDA).
        confidence_eos_eot_inf: Commit end-of-text and end-of-turn tokens last (LLaDA).
        stop_at_eos: Stop once everything before the first stop id is committed, and fill the rest with EOS
            (stop_until_eos in Kamichanw/d2Cache). False generates every position.
        seed: Of all randomness, 0 to 2**64 - 1. Equal seeds give equal tokens whatever the batch or the threads
            (Philox, Salmon et al. 2011); reference_quirks with a d2 cache is the one exception.
        cache: Which positions a step recomputes: "none"; "prefix" or "dual" (Fast-dLLM, arXiv 2505.22618); "dllm"
            (dLLM-Cache, arXiv 2506.06295); "d2" (d2Cache, arXiv 2509.23094). Or, with settings of their own, the
            objects NoCache(), PrefixCache(), DualCache(), DLLMCache(), D2Cache().
        reference_quirks: Decode as the released program of d2Cache does where that differs from the algorithms as
            stated, to reproduce published numbers (Kamichanw/d2Cache); docs/semantics.md lists the differences.
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
    gamma: float | None = None
    kl_threshold: float | None = None
    kl_history_length: int = 2
    sigma: float | None = None
    token_frequencies: TokenFrequencies | None = None
    clip_alpha: float = 10.0
    position_decay: float = 0.0
    autoregressive: bool = False
    cfg_scale: float = 0.0
    logits_eos_inf: bool = False
    confidence_eos_eot_inf: bool = False
    stop_at_eos: bool = True
    seed: int = 0
    cache: str | Cache = "prefix"
    reference_quirks: bool = False

    def __post_init__(self):
        check_fields(self, checks=_CHECKS)
        _C.validate_config(native_fields(self))

    @classmethod
    def reference(cls, **fields) -> "GenerationConfig":
        """LLaDA's plain loop (ML-GSAI/LLaDA, generate.py): one block, one token per step, no cache, no early stop.

        `fields` override, e.g. `GenerationConfig.reference(gen_length=256, block_length=32)`. Where they do not say
        otherwise, block_length and steps are gen_length; steps is left out if another rule is given.
        """
        length = fields.get("gen_length", cls.gen_length)
        defaults = {"gen_length": length, "block_length": length, "stop_at_eos": False, "cache": NoCache.name}
        if not any(fields.get(name) is not None for name in ("threshold", "factor", "gamma", "num_transfer_tokens")):
            defaults["steps"] = length
        return cls(**(defaults | fields))

    def to_dict(self) -> dict:
        """All of it as plain values, for JSON: `native_fields` with lists for arrays and tuples."""
        return {name: _plain(value) for name, value in native_fields(self).items()}


def native_fields(config: GenerationConfig) -> dict[str, typing.Any]:
    """The fields as in csrc/decode/config.h: a cache is its name and its settings, arrays are numpy's."""
    fields = {name: getattr(config, name) for name in kinds_of(GenerationConfig)}
    if config.token_frequencies is not None:
        fields["token_frequencies"] = config.token_frequencies.values
    if isinstance(config.cache, CACHES_WITH_SETTINGS):
        fields["cache"] = config.cache.name
        fields |= {native: getattr(config.cache, f.name) for native, f in cache_settings(type(config.cache)).items()}
    return fields


def flat_config(fields: dict[str, typing.Any]) -> GenerationConfig:
    """The GenerationConfig of settings side by side, as on the command line.

    fields: its own, and those of a cache by the names of `cache_settings`, where None is "not given".

    ConfigError for a setting of a cache that is not in use, and what GenerationConfig raises.
    """
    fields = dict(fields)
    for cls in CACHES_WITH_SETTINGS:
        names = cache_settings(cls)
        given = {name: value for name in names if (value := fields.pop(name, None)) is not None}
        if fields.get("cache") == cls.name:
            fields["cache"] = cls(**{names[name].name: value for name, value in given.items()})
        elif given:
            raise ConfigError(f'{next(iter(given))} is not allowed without cache = "{cls.name}"')
    return GenerationConfig(**fields)


def cache_settings(cls) -> dict[str, dataclasses.Field]:
    """Name in csrc/decode/config.h and on the command line -> field, of DLLMCache or D2Cache."""
    return {f.metadata.get("native", f.name): f for f in dataclasses.fields(cls)}


def field_docs(cls=GenerationConfig) -> dict[str, str]:
    """Name -> description of every field of GenerationConfig or a cache, from its docstring ({} under python -OO)."""
    attributes = (cls.__doc__ or "").partition("Attributes:\n")[2]
    parts = re.split(r"^ {8}(\w+): ", attributes, flags=re.MULTILINE)[1:]
    return {name: " ".join(text.split()) for name, text in zip(parts[::2], parts[1::2], strict=True)}


def _plain(value):
    return value.tolist() if hasattr(value, "tolist") else list(value) if isinstance(value, tuple) else value


def _check_cache(name, value):
    if isinstance(value, CACHES_WITH_SETTINGS):
        return value
    if isinstance(value, PrefixCache):
        check_bool("PrefixCache.use_dual", value.use_dual)
    if isinstance(value, Cache):
        return value.name
    if not isinstance(value, str):
        raise wrong_type(name, value, f"a name, {', '.join(c.__name__ + '()' for c in typing.get_args(Cache))}")
    return next((cls() for cls in CACHES_WITH_SETTINGS if cls.name == value), value)


def _check_frequencies(name, value):
    if not isinstance(value, TokenFrequencies):
        allowed = f"a TokenFrequencies, not {type(value).__name__}"
        raise ConfigError(f"{name} = {reprlib.repr(value)} is not allowed: it must be {allowed}")
    return value


_CHECKS = CHECKS | {str | Cache: _check_cache, TokenFrequencies: _check_frequencies}

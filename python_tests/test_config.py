"""GenerationConfig: every field's default, types, range and meaning; every illegal combination; caches."""

import dataclasses
import inspect
import json
import pickle
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dllm_ext import (
    _C,
    ConfigError,
    D2Cache,
    DLLMCache,
    DualCache,
    GenerationConfig,
    NoCache,
    PrefixCache,
    TokenFrequencies,
)
from dllm_ext.checks import kinds_of
from dllm_ext.config import field_docs, native_fields

DEFAULTS = {
    "gen_length": 128,
    "block_length": 32,
    "steps": None,
    "num_transfer_tokens": None,
    "temperature": 0.0,
    "top_p": None,
    "top_k": None,
    "remasking": "low_confidence",
    "schedule": "llada",
    "eps": 1e-3,
    "alg_temp": None,
    "threshold": None,
    "factor": None,
    "gamma": None,
    "kl_threshold": None,
    "kl_history_length": 2,
    "sigma": None,
    "token_frequencies": None,
    "clip_alpha": 10.0,
    "position_decay": 0.0,
    "autoregressive": False,
    "cfg_scale": 0.0,
    "logits_eos_inf": False,
    "confidence_eos_eot_inf": False,
    "stop_at_eos": True,
    "seed": 0,
    "cache": "prefix",
    "reference_quirks": False,
}
INTEGERS = ["gen_length", "block_length", "steps", "num_transfer_tokens", "top_k", "kl_history_length", "seed"]
NUMBERS = ["temperature", "top_p", "eps", "alg_temp", "threshold", "factor", "gamma", "kl_threshold", "sigma"]
NUMBERS += ["clip_alpha", "position_decay", "cfg_scale"]
FLAGS = ["autoregressive", "logits_eos_inf", "confidence_eos_eot_inf", "stop_at_eos", "reference_quirks"]
NAMES = ["remasking", "schedule", "cache"]
DLLM_DEFAULTS = {"kp": 50, "kr": 2, "rou": 0.25, "always_refresh_layers": (0,), "cfg_interval_steps": 1}
D2_DEFAULTS = {"rollout_p": 0.1, "current_k": 32, "d2_sigma": 10.0, "inflate_w": 4}
FREQUENCIES = TokenFrequencies([0.5, 0.25, 0.25])


def message(**fields):
    with pytest.raises(ConfigError) as e:
        GenerationConfig(**fields)
    return str(e.value)


def test_fields_and_defaults():
    assert dataclasses.asdict(GenerationConfig()) == DEFAULTS
    assert sorted([*INTEGERS, *NUMBERS, *FLAGS, *NAMES, "token_frequencies"]) == sorted(DEFAULTS)


def test_native_and_python_agree_on_fields_and_defaults():
    resolved = _C.validate_config({})
    assert resolved == DEFAULTS | {"threshold": 0.9} | DLLM_DEFAULTS | D2_DEFAULTS


@pytest.mark.parametrize("rule", ["steps", "factor", "gamma", "num_transfer_tokens"])
def test_default_threshold_gives_way_to_another_rule(rule):
    assert _C.validate_config({rule: 4})["threshold"] is None


def test_every_field_is_documented():
    docs = field_docs()
    assert list(docs) == list(DEFAULTS)
    assert all(len(text) > 20 for text in docs.values())
    for cls in (DLLMCache, D2Cache):
        assert list(field_docs(cls)) == [f.name for f in dataclasses.fields(cls)]
        assert "arXiv" in cls.__doc__


@pytest.mark.parametrize(
    "name",
    [
        *("block_length", "threshold", "factor", "remasking", "cache", "seed", "top_p", "gamma", "kl_threshold"),
        *("sigma", "token_frequencies", "position_decay", "autoregressive", "reference_quirks"),
    ],
)
def test_methods_name_their_source(name):
    sources = ("arXiv", "LLaDA", "Dream", "Philox", "PC-Sampler", "Kamichanw/d2Cache")
    assert any(source in field_docs()[name] for source in sources)


def test_kinds():
    kinds = kinds_of(GenerationConfig)
    assert [n for n, (kind, _) in kinds.items() if kind is int] == [n for n in DEFAULTS if n in INTEGERS]
    assert [n for n, (_, optional) in kinds.items() if optional] == [n for n, d in DEFAULTS.items() if d is None]


@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.parametrize("value", [1.0, "8", True, [8], 2**64, -(2**63) - 1, np.float32(2), np.array([1, 2])], ids=repr)
def test_wrong_integer(name, value):
    text = message(**{name: value})
    assert text.startswith(name) and "must be" in text


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize(
    "value", ["0.5", True, [0.5], 1j, 10**400, float("nan"), float("inf"), -1], ids=lambda v: repr(v)[:9]
)
def test_wrong_number(name, value):
    text = message(**{name: value})
    assert text.startswith(name) and "not allowed" in text


@pytest.mark.parametrize("name", FLAGS)
@pytest.mark.parametrize("value", [1, 0, "yes", None, []], ids=repr)
def test_wrong_flag(name, value):
    text = message(**{name: value})
    assert text.startswith(f"{name} = {value!r}") and "True or False" in text


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [1, None, b"none", ["none"]], ids=repr)
def test_wrong_name_type(name, value):
    assert message(**{name: value}).startswith(f"{name} = {value!r}")


@pytest.mark.parametrize(
    ("name", "exist"),
    [
        ("remasking", ["low_confidence", "topk_margin", "entropy", "random", "origin"]),
        ("schedule", ["llada", "dream"]),
        ("cache", ["none", "prefix", "dual", "dllm", "d2"]),
    ],
)
@pytest.mark.parametrize("value", ["", "magic", "Prefix"], ids=repr)
def test_unknown_name_lists_what_exists(name, exist, value):
    text = message(**{name: value})
    assert text.startswith(name)
    assert all(f'"{e}"' in text for e in exist)


@pytest.mark.parametrize("name", [n for n, d in DEFAULTS.items() if d is not None])
def test_none_only_where_it_means_something(name):
    assert message(**{name: None}).startswith(f"{name} = None")


@pytest.mark.parametrize(
    ("fields", "allowed"),
    [
        ({"gen_length": -1}, "between 0 and"),
        ({"gen_length": 2**40}, "between 0 and"),
        ({"block_length": 0}, "between 1 and"),
        ({"steps": 0}, "at least 1"),
        ({"steps": -4}, "at least 1"),
        ({"steps": 3}, "multiple of the number of blocks, 4"),
        ({"num_transfer_tokens": 0}, "at least 1"),
        ({"temperature": -0.1}, "0 or a positive number"),
        ({"top_p": 0.0}, "(0, 1]"),
        ({"top_p": 1.01}, "(0, 1]"),
        ({"top_k": 0}, "at least 1"),
        ({"eps": 0.0}, "(0, 1)"),
        ({"eps": 1.0}, "(0, 1)"),
        ({"alg_temp": 0.0, "steps": 4}, "positive"),
        ({"threshold": -0.01}, "[0, 1]"),
        ({"threshold": 1.01}, "[0, 1]"),
        ({"factor": 0.0}, "positive"),
        ({"gamma": -0.1}, "0 or a positive number"),
        ({"kl_threshold": 0.0}, "positive"),
        ({"kl_history_length": 0}, "between 1 and 64"),
        ({"kl_history_length": 65}, "between 1 and 64"),
        ({"sigma": -1.0}, "0 or a positive number"),
        ({"clip_alpha": 0.0}, "positive"),
        ({"position_decay": -0.1}, "0 or a positive number"),
        ({"temperature": 1e-300}, "0 or a positive number of fp32"),
        ({"cfg_scale": -1.0}, "in [0, 1000000]"),
        ({"cfg_scale": 1e38}, "in [0, 1000000]"),
        ({"seed": -1}, "between 0 and"),
    ],
    ids=str,
)
def test_out_of_range(fields, allowed):
    name, value = next(iter(fields.items()))
    text = message(**fields)
    assert text.startswith(f"{name} = {value:g}" if isinstance(value, float) else f"{name} = {value}")
    assert allowed in text


@pytest.mark.parametrize(
    ("cache", "setting", "allowed"),
    [
        (DLLMCache(kp=0), "kp = 0", "at least 1"),
        (DLLMCache(kr=0), "kr = 0", "at least 1"),
        (DLLMCache(rou=-0.1), "rou = -0.1", "[0, 1]"),
        (DLLMCache(rou=1.1), "rou = 1.1", "[0, 1]"),
        (DLLMCache(always_refresh_layers=(0, -1)), "always_refresh_layers = -1", "from 0"),
        (DLLMCache(cfg_interval_steps=0), "cfg_interval_steps = 0", "at least 1"),
        (D2Cache(rollout_p=-0.1), "rollout_p = -0.1", "[0, 1]"),
        (D2Cache(rollout_p=1.1), "rollout_p = 1.1", "[0, 1]"),
        (D2Cache(rollout_p=float("nan")), "rollout_p = nan", "[0, 1]"),
        (D2Cache(current_k=0), "current_k = 0", "at least 1"),
        (D2Cache(sigma=0), "d2_sigma = 0", "positive"),
        (D2Cache(sigma=float("inf")), "d2_sigma = inf", "positive"),
        (D2Cache(inflate_w=-1), "inflate_w = -1", "0 or more"),
    ],
    ids=str,
)
def test_cache_setting_out_of_range(cache, setting, allowed):
    text = message(cache=cache)
    assert text.startswith(f"{setting} is not allowed") and allowed in text


@pytest.mark.parametrize(
    "fields",
    [
        {"gen_length": 0},
        {"threshold": 0},
        {"threshold": 1},
        {"top_p": 1},
        {"seed": 2**64 - 1},
        {"block_length": 1, "gen_length": 5},
        {"gen_length": 20, "block_length": 8, "steps": 3},
        {"steps": 128, "num_transfer_tokens": 2},
        {"factor": 1, "num_transfer_tokens": 2},
        {"alg_temp": 0.5, "num_transfer_tokens": 2},
        {"remasking": "entropy", "steps": 8},
        {"remasking": "origin", "schedule": "dream", "steps": 8},
        {"gamma": 0},
        {"gamma": 0.1, "remasking": "entropy", "num_transfer_tokens": 2},
        {"kl_threshold": 0.01, "threshold": 0.5, "kl_history_length": 64},
        {"kl_threshold": 0.01, "factor": 1, "kl_history_length": 1},
        {"sigma": 0},
        {"sigma": 5, "alg_temp": 1, "steps": 8},
        {"token_frequencies": FREQUENCIES, "position_decay": 0.25, "sigma": 5, "gamma": 0.1},
        {"autoregressive": True},
        {"autoregressive": True, "steps": 8, "cache": DLLMCache(kp=1, kr=1)},
        {"autoregressive": True, "cache": D2Cache(), "reference_quirks": True},
        {"cache": DLLMCache(kp=1, kr=1, rou=0, always_refresh_layers=())},
        {"cache": DLLMCache(rou=1, cfg_interval_steps=4), "cfg_scale": 1},
        {"cache": D2Cache(rollout_p=0, current_k=1, inflate_w=0)},
        {"cache": D2Cache(rollout_p=1), "remasking": "entropy", "steps": 8},
        {"reference_quirks": True, "gamma": 0.1, "sigma": 5},
    ],
    ids=str,
)
def test_limits_and_combinations_that_are_allowed(fields):
    config = GenerationConfig(**fields)
    assert {name: getattr(config, name) for name in fields} == fields


ORIGIN = {"remasking": "origin", "schedule": "dream", "steps": 8}
CHOICE = "autoregressive leaves no choice"
ILLEGAL = [  # in the order of kIllegal in csrc/decode/config.cpp: settings, what the message names, its reason
    ({"steps": 8, "threshold": 0.9}, ["steps", "threshold"], "give one"),
    ({"steps": 8, "factor": 1.0}, ["steps", "factor"], "give one"),
    ({"threshold": 0.9, "factor": 1.0}, ["threshold", "factor"], "give one"),
    ({"threshold": 0.9, "gamma": 1.0}, ["threshold", "gamma"], "give one"),
    ({"steps": 8, "gamma": 1.0}, ["steps", "gamma"], "give one"),
    ({"threshold": 0.5, "remasking": "entropy"}, ["threshold", "entropy"], "a threshold is a probability"),
    ({"remasking": "random"}, ["threshold", "random"], "a threshold is a probability"),
    ({"factor": 1.0, "remasking": "random"}, ["factor", "random"], "bound is on probabilities"),
    ({"remasking": "origin", "schedule": "dream", "gamma": 1.0}, ["origin"], "Dream schedule's time steps"),
    ({"remasking": "origin", "steps": 8}, ["origin", "dream"], "Dream schedule's time steps"),
    (ORIGIN | {"num_transfer_tokens": 1}, ["origin", "num_transfer_tokens"], "transfer independently"),
    (ORIGIN | {"alg_temp": 1.0}, ["origin", "alg_temp"], "no confidence to draw by"),
    ({"alg_temp": 1.0}, ["alg_temp", "threshold"], "a given number of positions"),
    ({"alg_temp": 1.0, "factor": 1.0}, ["alg_temp", "factor"], "a given number of positions"),
    ({"alg_temp": 1.0, "gamma": 1.0}, ["alg_temp", "gamma"], "a given number of positions"),
    ({"confidence_eos_eot_inf": True, "remasking": "entropy", "steps": 8}, ["confidence_eos_eot_inf"], "end-of-text"),
    (ORIGIN | {"sigma": 5.0}, ["origin", "sigma"], "transfers each by itself"),
    (ORIGIN | {"position_decay": 0.1}, ["origin", "position_decay"], "transfers each by itself"),
    (ORIGIN | {"token_frequencies": FREQUENCIES}, ["origin", "token_frequencies"], "transfers each by itself"),
    (ORIGIN | {"cache": "d2"}, ["origin", "d2"], "chooses its rows by confidence"),
    ({"kl_threshold": 0.1, "steps": 8}, ["kl_threshold", "steps"], "filters what threshold or factor choose"),
    ({"kl_threshold": 0.1, "gamma": 1.0}, ["kl_threshold", "gamma"], "filters what threshold or factor choose"),
    ({"kl_threshold": 0.1, "num_transfer_tokens": 1}, ["num_transfer_tokens"], "filters what threshold or factor"),
    ({"token_frequencies": FREQUENCIES, "remasking": "topk_margin"}, ["low_confidence"], "the proposed token"),
    ({"autoregressive": True, "factor": 1.0}, ["autoregressive", "factor"], CHOICE),
    ({"autoregressive": True, "gamma": 1.0}, ["autoregressive", "gamma"], CHOICE),
    ({"autoregressive": True, "alg_temp": 1.0, "steps": 8}, ["autoregressive", "alg_temp"], CHOICE),
    ({"autoregressive": True, "kl_threshold": 0.1}, ["autoregressive", "kl_threshold"], CHOICE),
    ({"autoregressive": True, "sigma": 5.0}, ["autoregressive", "sigma"], CHOICE),
    ({"autoregressive": True, "token_frequencies": FREQUENCIES}, ["autoregressive", "token_frequencies"], CHOICE),
    ({"autoregressive": True, "position_decay": 0.1}, ["autoregressive", "position_decay"], CHOICE),
    ({"autoregressive": True, "remasking": "random", "steps": 8}, ["autoregressive", "random"], CHOICE),
    ({"autoregressive": True, "cache": "d2"}, ["autoregressive", "d2"], "may not compute the first masked position"),
    ({"cache": DLLMCache(cfg_interval_steps=2)}, ["cfg_interval_steps", "cfg_scale"], "no guidance"),
    ({"reference_quirks": True, "steps": 8}, ["reference_quirks", "steps"], "harness has none"),
    ({"reference_quirks": True, "cfg_scale": 1.0}, ["reference_quirks", "cfg_scale"], "harness has none"),
    ({"reference_quirks": True, "alg_temp": 1, "num_transfer_tokens": 1}, ["alg_temp"], "harness has none"),
    ({"reference_quirks": True, "logits_eos_inf": True}, ["logits_eos_inf"], "harness has none"),
    ({"reference_quirks": True, "confidence_eos_eot_inf": True}, ["confidence_eos_eot_inf"], "harness has none"),
    ({"reference_quirks": True, "position_decay": 0.1}, ["position_decay"], "harness has none"),
]


@pytest.mark.parametrize(("fields", "words", "reason"), ILLEGAL, ids=str)
def test_illegal_combination_names_its_parts_and_a_reason(fields, words, reason):
    what, why = message(**fields).split(": ", 1)
    assert all(word in what for word in words)
    assert reason in why and len(why) > 20


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        *(({name: 7}, "settings of dLLM-Cache") for name in ("kp", "kr", "cfg_interval_steps")),
        ({"rou": 0.5}, "settings of dLLM-Cache"),
        ({"always_refresh_layers": [0, 1]}, "settings of dLLM-Cache"),
        ({"kp": 7, "cache": "d2"}, "settings of dLLM-Cache"),
        *(({name: 1}, "settings of d2Cache") for name in ("rollout_p", "current_k", "d2_sigma", "inflate_w")),
        ({"current_k": 1, "cache": "dllm"}, "settings of d2Cache"),
    ],
    ids=str,
)
def test_native_settings_of_another_cache(fields, reason):
    """Python cannot say it, C++ can."""
    with pytest.raises(ConfigError, match=reason):
        _C.validate_config({"cfg_scale": 1.0} | fields)


@pytest.mark.parametrize("name", ["Gen_length", "max_tokens", "kp", "d2_sigma"])
def test_unknown_field_lists_the_fields(name):
    text = message(**{name: 1})
    assert f"'{name}'" in text
    assert all(field in text for field in DEFAULTS)


def test_positional_arguments_are_refused():
    with pytest.raises(ConfigError, match="keyword"):
        GenerationConfig(64)


def test_signature_shows_the_fields():
    assert list(inspect.signature(GenerationConfig).parameters) == list(DEFAULTS)


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        GenerationConfig().steps = 4


def test_numpy_and_other_numbers_become_plain():
    config = GenerationConfig(
        gen_length=np.int64(64), seed=np.uint64(2**63), threshold=np.float64(0.5), stop_at_eos=np.True_, cfg_scale=1
    )
    assert config == GenerationConfig(gen_length=64, seed=2**63, threshold=0.5, cfg_scale=1.0)
    assert json.loads(json.dumps(config.to_dict())) == config.to_dict() == dataclasses.asdict(config)
    assert GenerationConfig(threshold=Fraction(1, 2)).threshold == 0.5
    assert type(config.cfg_scale) is float and type(config.stop_at_eos) is bool


@pytest.mark.parametrize(
    ("cache", "name"),
    [
        (NoCache(), "none"),
        (PrefixCache(), "prefix"),
        (PrefixCache(use_dual=False), "prefix"),
        (PrefixCache(use_dual=True), "dual"),
        (DualCache(), "dual"),
    ],
    ids=repr,
)
def test_cache_objects_are_their_names(cache, name):
    assert GenerationConfig(cache=cache) == GenerationConfig(cache=name)
    assert GenerationConfig(cache=cache).cache == name


@pytest.mark.parametrize("cls", [DLLMCache, D2Cache])
def test_caches_with_settings_stay_objects(cls):
    assert GenerationConfig(cache=cls.name).cache == cls() == GenerationConfig(cache=cls()).cache
    assert GenerationConfig(cache=cls.name) == GenerationConfig(cache=cls())
    assert len({cls(), cls()}) == 1 and pickle.loads(pickle.dumps(cls())) == cls()
    assert dataclasses.replace(GenerationConfig(cache=cls.name), gen_length=4).cache == cls()
    with pytest.raises(dataclasses.FrozenInstanceError):
        cls().name = "none"


def test_cache_defaults():
    assert dataclasses.asdict(DLLMCache()) == DLLM_DEFAULTS
    assert list(dataclasses.asdict(D2Cache()).values()) == list(D2_DEFAULTS.values())


def test_native_fields_and_dict():
    base = DEFAULTS | {"gen_length": 64}
    config = GenerationConfig(gen_length=64, cache=DLLMCache(kp=5, always_refresh_layers=[0, 2]))
    expected = base | DLLM_DEFAULTS | {"cache": "dllm", "kp": 5, "always_refresh_layers": (0, 2)}
    assert native_fields(config) == expected
    assert config.to_dict() == expected | {"always_refresh_layers": [0, 2]}
    resolved = _C.validate_config(native_fields(config))
    assert resolved == expected | {"threshold": 0.9} | D2_DEFAULTS

    config = GenerationConfig(gen_length=64, cache=D2Cache(sigma=3), token_frequencies=FREQUENCIES)
    expected = base | D2_DEFAULTS | {"cache": "d2", "d2_sigma": 3.0, "token_frequencies": [0.5, 0.25, 0.25]}
    assert native_fields(config)["token_frequencies"] is FREQUENCIES.values
    assert config.to_dict() == expected == json.loads(json.dumps(config.to_dict()))
    resolved = _C.validate_config(native_fields(config))
    array = resolved["token_frequencies"]
    assert array.dtype == np.float64 and array.tolist() == FREQUENCIES.values.tolist()
    assert resolved["d2_sigma"] == 3.0 and resolved["cache"] == "d2"


@pytest.mark.parametrize("value", ["abc", [[0.1]], 0.5, ["x"], {}], ids=repr)
def test_native_frequencies_of_the_wrong_type(value):
    with pytest.raises(ConfigError, match="token_frequencies = "):
        _C.validate_config({"token_frequencies": value})


@pytest.mark.parametrize("value", [[0.5, 0.5, 0], np.float32([0.5, 0.5, 0]), np.arange(6.0)[::2] / 8], ids=repr)
def test_native_frequencies_of_any_array(value):
    shown = _C.validate_config({"token_frequencies": value})["token_frequencies"]
    assert shown.tolist() == [float(v) for v in value]


def test_native_frequencies_out_of_range():
    with pytest.raises(ConfigError, match=r"token_frequencies = 2 .* \[0, 1\] for every token"):
        _C.validate_config({"token_frequencies": [0.5, 2.0]})


@pytest.mark.parametrize("value", [[0.5], np.zeros(4), "file.json", {0: 1}, 1, list(range(10**5))], ids=type)
def test_frequencies_of_the_wrong_type(value):
    text = message(token_frequencies=value)
    assert text.startswith("token_frequencies = ") and "TokenFrequencies" in text and len(text) < 200


def test_cache_class_instead_of_object():
    assert "cache" in message(cache=DualCache)
    assert "D2Cache()" in message(cache=D2Cache)


@pytest.mark.parametrize(
    ("cls", "fields", "text"),
    [
        (DLLMCache, {"kp": "x"}, "DLLMCache.kp = 'x' is not allowed: it must be an integer, not str"),
        (DLLMCache, {"kr": 2.0}, "DLLMCache.kr = 2.0 is not allowed: it must be an integer, not float"),
        (DLLMCache, {"rou": None}, "DLLMCache.rou = None is not allowed: it must be a number, not NoneType"),
        (DLLMCache, {"always_refresh_layers": 0}, "DLLMCache.always_refresh_layers = 0 is not allowed: it must be"),
        (DLLMCache, {"always_refresh_layers": "01"}, "DLLMCache.always_refresh_layers = '01' is not allowed"),
        (DLLMCache, {"always_refresh_layers": (0, 1.5)}, "DLLMCache.always_refresh_layers[1] = 1.5 is not allowed"),
        (DLLMCache, {"cfg_interval_steps": True}, "DLLMCache.cfg_interval_steps = True is not allowed"),
        (DLLMCache, {"kq": 1}, "'kq' is not a field of DLLMCache (fields: kp, kr, rou, always_refresh_layers, cfg_in"),
        (DLLMCache, {"name": "d2"}, "'name' is not a field of DLLMCache"),
        (D2Cache, {"rollout_p": "0.1"}, "D2Cache.rollout_p = '0.1' is not allowed: it must be a number, not str"),
        (D2Cache, {"current_k": 2**63}, f"D2Cache.current_k = {2**63} is not allowed: it must be between"),
        (D2Cache, {"sigma": True}, "D2Cache.sigma = True is not allowed"),
        (D2Cache, {"inflate_w": [1]}, "D2Cache.inflate_w = [1] is not allowed"),
        (D2Cache, {"d2_sigma": 1}, "'d2_sigma' is not a field of D2Cache (fields: rollout_p, current_k, sigma"),
    ],
    ids=str,
)
def test_wrong_cache_setting(cls, fields, text):
    with pytest.raises(ConfigError) as e:
        cls(**fields)
    assert str(e.value).startswith(text)


def test_cache_settings_are_named():
    with pytest.raises(ConfigError, match="keyword arguments only"):
        DLLMCache(50)


def test_cache_settings_become_plain():
    cache = DLLMCache(kp=np.int64(4), rou=1, always_refresh_layers=range(2))
    assert cache == DLLMCache(kp=4, rou=1.0, always_refresh_layers=(0, 1))
    assert type(cache.kp) is int and type(cache.rou) is float and type(cache.always_refresh_layers) is tuple


def test_cache_with_a_wrong_parameter():
    assert message(cache=PrefixCache(use_dual="yes")).startswith("PrefixCache.use_dual = 'yes'")


def test_replace_pickle_hash():
    config = GenerationConfig(steps=8, gen_length=64)
    assert dataclasses.replace(config, steps=16).steps == 16
    assert config.steps == 8
    assert pickle.loads(pickle.dumps(config)) == config
    assert len({config, GenerationConfig(steps=8, gen_length=64)}) == 1
    with pytest.raises(ConfigError, match="give one"):
        dataclasses.replace(config, threshold=0.5)
    with pytest.raises(ConfigError, match="not a field"):
        dataclasses.replace(config, max_tokens=1)


def test_reference_is_lladas_plain_loop():
    expected = {"gen_length": 128, "block_length": 128, "steps": 128, "stop_at_eos": False, "cache": "none"}
    assert dataclasses.asdict(GenerationConfig.reference()) == DEFAULTS | expected


def test_reference_follows_its_fields():
    config = GenerationConfig.reference(gen_length=64, block_length=16)
    assert (config.gen_length, config.block_length, config.steps) == (64, 16, 64)
    assert GenerationConfig.reference(gen_length=64).block_length == 64
    assert GenerationConfig.reference(threshold=0.8).steps is None
    assert GenerationConfig.reference(gamma=0.8).steps is None
    assert GenerationConfig.reference(cache="dual", stop_at_eos=True).cache == "dual"
    with pytest.raises(ConfigError, match="gen_length"):
        GenerationConfig.reference(gen_length="long")


junk = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.sampled_from(["", "none", "entropy", "dllm", "d2", D2Cache(), FREQUENCIES]),
    st.lists(st.integers(), max_size=2),
)


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from(list(DEFAULTS)), junk, max_size=4))
def test_anything_is_a_config_or_a_config_error(fields):
    try:
        config = GenerationConfig(**fields)
    except ConfigError as e:
        assert str(e)
    else:
        assert json.loads(json.dumps(config.to_dict())) == config.to_dict()
        assert dataclasses.replace(config) == config

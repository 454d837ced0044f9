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

from dllm_ext import _C, ConfigError, DualCache, GenerationConfig, NoCache, PrefixCache
from dllm_ext.config import field_docs, field_kinds

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
    "cfg_scale": 0.0,
    "logits_eos_inf": False,
    "confidence_eos_eot_inf": False,
    "stop_at_eos": True,
    "seed": 0,
    "cache": "prefix",
}
INTEGERS = ["gen_length", "block_length", "steps", "num_transfer_tokens", "top_k", "seed"]
NUMBERS = ["temperature", "top_p", "eps", "alg_temp", "threshold", "factor", "cfg_scale"]
FLAGS = ["logits_eos_inf", "confidence_eos_eot_inf", "stop_at_eos"]
NAMES = ["remasking", "schedule", "cache"]


def message(**fields):
    with pytest.raises(ConfigError) as e:
        GenerationConfig(**fields)
    return str(e.value)


def test_fields_and_defaults():
    assert dataclasses.asdict(GenerationConfig()) == DEFAULTS
    assert sorted(INTEGERS + NUMBERS + FLAGS + NAMES) == sorted(DEFAULTS)


def test_native_and_python_agree_on_fields_and_defaults():
    resolved = _C.validate_config({})
    assert resolved == DEFAULTS | {"threshold": 0.9}


@pytest.mark.parametrize("rule", ["steps", "factor", "num_transfer_tokens"])
def test_default_threshold_gives_way_to_another_rule(rule):
    assert _C.validate_config({rule: 4})["threshold"] is None


def test_every_field_is_documented():
    docs = field_docs()
    assert list(docs) == list(DEFAULTS)
    assert all(len(text) > 20 for text in docs.values())


@pytest.mark.parametrize("name", ["block_length", "threshold", "factor", "remasking", "cache", "seed", "top_p"])
def test_methods_name_their_source(name):
    assert any(source in field_docs()[name] for source in ("arXiv", "LLaDA", "Dream", "Philox"))


def test_kinds():
    kinds = field_kinds()
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
        ("cache", ["none", "prefix", "dual"]),
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
        ({"cfg_scale": -1.0}, "positive"),
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
    ],
    ids=str,
)
def test_limits_and_combinations_that_are_allowed(fields):
    config = GenerationConfig(**fields)
    assert {name: getattr(config, name) for name in fields} == fields


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"steps": 8, "threshold": 0.9}, ["steps", "threshold"]),
        ({"steps": 8, "factor": 1.0}, ["steps", "factor"]),
        ({"threshold": 0.9, "factor": 1.0}, ["threshold", "factor"]),
        ({"threshold": 0.5, "remasking": "entropy"}, ["threshold", "entropy"]),
        ({"remasking": "random"}, ["threshold", "random"]),
        ({"factor": 1.0, "remasking": "random"}, ["factor", "random"]),
        ({"remasking": "origin", "schedule": "dream"}, ["origin"]),
        ({"remasking": "origin", "steps": 8}, ["origin", "dream"]),
        (
            {"remasking": "origin", "schedule": "dream", "steps": 8, "num_transfer_tokens": 1},
            ["origin", "num_transfer_tokens"],
        ),
        ({"remasking": "origin", "schedule": "dream", "steps": 8, "alg_temp": 1.0}, ["origin", "alg_temp"]),
        ({"alg_temp": 1.0}, ["alg_temp", "threshold"]),
        ({"alg_temp": 1.0, "factor": 1.0}, ["alg_temp", "factor"]),
        ({"confidence_eos_eot_inf": True, "remasking": "entropy", "steps": 8}, ["confidence_eos_eot_inf", "entropy"]),
    ],
    ids=str,
)
def test_illegal_combination_names_its_parts_and_a_reason(fields, words):
    text = message(**fields)
    assert all(word in text for word in words)
    assert ": " in text and len(text.split(": ", 1)[1]) > 20


@pytest.mark.parametrize("name", ["gamma", "kl_threshold", "sigma", "reference_quirks", "Gen_length", "max_tokens"])
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
    assert json.loads(json.dumps(dataclasses.asdict(config))) == dataclasses.asdict(config)
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


def test_cache_class_instead_of_object():
    assert "cache" in message(cache=DualCache)


def test_cache_with_a_wrong_parameter():
    assert message(cache=PrefixCache(use_dual="yes")).startswith("PrefixCache.use_dual = 'yes'")


def test_replace_pickle_hash():
    config = GenerationConfig(steps=8, gen_length=64)
    assert dataclasses.replace(config, steps=16).steps == 16
    assert config.steps == 8
    assert pickle.loads(pickle.dumps(config)) == config
    assert len({config, GenerationConfig(steps=8, gen_length=64)}) == 1
    with pytest.raises(ConfigError, match="together"):
        dataclasses.replace(config, threshold=0.5)
    with pytest.raises(ConfigError, match="not a field"):
        dataclasses.replace(config, gamma=1)


def test_reference_is_lladas_plain_loop():
    expected = {"gen_length": 128, "block_length": 128, "steps": 128, "stop_at_eos": False, "cache": "none"}
    assert dataclasses.asdict(GenerationConfig.reference()) == DEFAULTS | expected


def test_reference_follows_its_fields():
    config = GenerationConfig.reference(gen_length=64, block_length=16)
    assert (config.gen_length, config.block_length, config.steps) == (64, 16, 64)
    assert GenerationConfig.reference(gen_length=64).block_length == 64
    assert GenerationConfig.reference(threshold=0.8).steps is None
    assert GenerationConfig.reference(cache="dual", stop_at_eos=True).cache == "dual"
    with pytest.raises(ConfigError, match="gen_length"):
        GenerationConfig.reference(gen_length="long")


junk = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.sampled_from(["", "none", "entropy"]),
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
        assert all(type(v) in (int, float, bool, str, type(None)) for v in dataclasses.asdict(config).values())
        assert dataclasses.replace(config) == config

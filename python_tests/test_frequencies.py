"""TokenFrequencies: from shares, counts, corpora and files; equality, copies, and what is refused."""

import copy
import dataclasses
import json
import pickle
from collections import Counter
from pathlib import Path

import models
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dllm_ext import ConfigError, Engine, GenerationConfig, InputError, TokenFrequencies

VALUES = [0.5, 0.25, 0.0, 1.0]


@pytest.mark.parametrize(
    "values", [VALUES, tuple(VALUES), np.float32(VALUES), torch.tensor(VALUES), np.array(VALUES * 2)[4:]], ids=type
)
def test_values_are_read_only_float64(values):
    f = TokenFrequencies(values)
    assert f.values.dtype == np.float64 and f.values.tolist() == VALUES and f.total is None
    with pytest.raises(ValueError, match="read-only"):
        f.values[0] = 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        f.values = VALUES


def test_values_are_a_copy():
    given = np.array(VALUES)
    f = TokenFrequencies(given)
    given[0] = 0
    assert f.values[0] == 0.5


def test_integers_are_numbers():
    assert TokenFrequencies([0, 1]) == TokenFrequencies([0.0, 1.0])


@pytest.mark.parametrize(
    "values",
    ["abc", None, 0.5, [], [[0.5]], ["0.5"], [True], [1j], [None], [[0.5], [0.5, 0.5]], {0: 0.5}],
    ids=repr,
)
def test_wrong_values(values):
    with pytest.raises(ConfigError, match=r"values of TokenFrequencies are not allowed: .{10}"):
        TokenFrequencies(values)


@pytest.mark.parametrize("wrong", [1.001, -1e-9, float("nan"), float("inf"), 2])
def test_values_out_of_range(wrong):
    with pytest.raises(ConfigError, match=r"frequency of token 2 = .* it must be in \[0, 1\]"):
        TokenFrequencies([0.5, 0.5, wrong, 7])


def test_equal_by_content():
    f = TokenFrequencies(VALUES)
    assert f == TokenFrequencies(np.array(VALUES)) and hash(f) == hash(TokenFrequencies(VALUES))
    assert f == TokenFrequencies.from_counts({0: 2, 1: 1, 2: 0, 3: 4}, 4, 4)
    assert f != TokenFrequencies(VALUES[:3]) and f != TokenFrequencies([0.5, 0.25, 0.1, 1.0]) and f != VALUES
    assert TokenFrequencies([-0.0]) == TokenFrequencies([0.0])
    assert len({TokenFrequencies([-0.0]), TokenFrequencies([0.0])}) == 1


def test_repr_is_short():
    assert repr(TokenFrequencies(np.zeros(126464))) == "TokenFrequencies(126464 tokens)"


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda f: pickle.loads(pickle.dumps(f))])
def test_copies(duplicate):
    f = TokenFrequencies.from_counts({1: 3}, 7, 5)
    g = duplicate(f)
    assert g == f and g.total == 7 and not g.values.flags.writeable


def test_counts():
    """What has no count gets 1 / total, whatever the counts sum to; a count of 0 stays 0."""
    f = TokenFrequencies.from_counts({4: 6, 0: 3, 2: 0}, 10, 6)
    assert f.values.tolist() == [0.3, 0.1, 0.0, 0.1, 0.6, 0.1] and f.total == 10
    assert TokenFrequencies.from_counts(Counter([1, 1]), np.int64(4), 2) == TokenFrequencies([0.25, 0.5])


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (({}, 0, 4), "total = 0 is not allowed: it must be at least 1"),
        (({}, -1, 4), "total = -1 is not allowed"),
        (({}, 1.5, 4), "total = 1.5 is not allowed: it must be an integer"),
        (({}, 4, 0), "vocab_size = 0 is not allowed: it must be at least 1"),
        (({}, 4, "4"), "vocab_size = '4' is not allowed: it must be an integer"),
        (([1, 2], 4, 4), "counts is not allowed: it must map ids to counts, not be a list"),
        (({4: 1}, 4, 4), "the id 4 in counts is not allowed: it must be between 0 and 3"),
        (({-1: 1}, 4, 4), "the id -1 in counts is not allowed"),
        (({"1": 1}, 4, 4), "the id in counts = '1' is not allowed: it must be an integer"),
        (({1: 5}, 4, 4), "counts[1] = 5 is not allowed: it must be between 0 and total = 4"),
        (({1: -1}, 4, 4), "counts[1] = -1 is not allowed"),
        (({1: float("nan")}, 4, 4), "counts[1] = nan is not allowed"),
        (({1: "2"}, 4, 4), "counts[1] = '2' is not allowed: it must be a number"),
        (({1: None}, 4, 4), "counts[1] = None is not allowed"),
    ],
    ids=str,
)
def test_wrong_counts(arguments, text):
    with pytest.raises(ConfigError) as e:
        TokenFrequencies.from_counts(*arguments)
    assert str(e.value).startswith(text)


def test_the_file_is_pc_samplers(tmp_path):
    """The format as its loader reads it: num_token, and counts under ids that are strings."""
    f = TokenFrequencies.from_counts({3: 5, 1: 1, 2: 0}, 8, 4)
    f.save(tmp_path / "f.json")
    data = json.loads((tmp_path / "f.json").read_text())
    assert data == {"num_token": 8, "p_baseline_dict": {"2": 0, "3": 5}}
    (tmp_path / "g.json").write_text(json.dumps({"num_token": 8, "p_baseline_dict": {"3": 5, "1": 1, "2": 0}}))
    assert TokenFrequencies.load(tmp_path / "f.json", 4) == TokenFrequencies.load(tmp_path / "g.json", 4) == f
    assert TokenFrequencies.load(str(tmp_path / "f.json"), 4).total == 8
    assert TokenFrequencies.load(tmp_path / "f.json", 6).values.tolist() == [*f.values, 1 / 8, 1 / 8]


@given(st.integers(1, 2**40).flatmap(lambda n: st.tuples(st.just(n), st.lists(st.integers(0, n), min_size=1))))
def test_counts_come_back(tmp_path_factory, case):
    total, counts = case
    f = TokenFrequencies.from_counts(dict(enumerate(counts)), total, len(counts) + 1)
    path = tmp_path_factory.getbasetemp() / "counts.json"
    f.save(path)
    assert all(type(n) is int for n in json.loads(path.read_text())["p_baseline_dict"].values())
    assert TokenFrequencies.load(path, len(counts) + 1) == f


@given(st.lists(st.floats(0, 1), min_size=1))
def test_shares_come_back(tmp_path_factory, values):
    path = tmp_path_factory.getbasetemp() / "shares.json"
    TokenFrequencies(values).save(path)
    assert TokenFrequencies.load(path, len(values)) == TokenFrequencies(values)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("", "cannot be read"),
        ("{", "cannot be read"),
        ("[" * 10**5, "cannot be read"),
        (b"\xff\xfe\x00", "cannot be read"),
        ("[]", "a JSON object with num_token and p_baseline_dict"),
        ("3", "a JSON object with num_token and p_baseline_dict"),
        ('{"num_token": 3}', "a JSON object with num_token and p_baseline_dict"),
        ('{"p_baseline_dict": {}}', "a JSON object with num_token and p_baseline_dict"),
        ('{"num_token": 3, "p_baseline_dict": [1]}', "a JSON object with num_token and p_baseline_dict"),
        ('{"num_token": 3, "p_baseline_dict": {"a": 1}}', "'a'"),
        ('{"num_token": 3, "p_baseline_dict": {"1.0": 1}}', "'1.0'"),
        ('{"num_token": "3", "p_baseline_dict": {}}', "total = '3'"),
        ('{"num_token": 0, "p_baseline_dict": {}}', "total = 0"),
        ('{"num_token": 3, "p_baseline_dict": {"9": 1}}', "the id 9 in counts"),
        ('{"num_token": 3, "p_baseline_dict": {"1": 4}}', "counts[1] = 4"),
        ('{"num_token": 3, "p_baseline_dict": {"1": NaN}}', "counts[1] = nan"),
        ('{"num_token": 3, "p_baseline_dict": {"1": [1]}}', "counts[1] = [1]"),
    ],
    ids=lambda x: repr(x)[:40],
)
def test_damaged_files(tmp_path, content, text):
    path = tmp_path / "f.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError) as e:
        TokenFrequencies.load(path, 4)
    assert str(path) in str(e.value) and text in str(e.value)


def test_missing_file(tmp_path):
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(ConfigError, match="cannot be read"):
            TokenFrequencies.load(path, 4)


# Corpora


def test_corpus(engine, tmp_path):
    """Lines are encoded by themselves, with their line breaks; files add up."""
    a, b = tmp_path / "a.txt", tmp_path / "b.txt"
    a.write_text("aab\n\nb é\n", encoding="utf-8")
    b.write_text("a")
    ids = [t for text in ("aab\n", "\n", "b é\n", "a") for t in engine.encode(text, chat=False)]
    f = TokenFrequencies.from_corpus([a, str(b)], engine)
    assert f == TokenFrequencies.from_counts(Counter(ids), len(ids), engine.spec.vocab_size)
    assert f.total == len(ids)
    a_id = engine.encode("a", chat=False)[-1]
    assert f.values[a_id] == 3 / len(ids)
    for one in (b, str(b)):
        assert TokenFrequencies.from_corpus(one, engine).values[a_id] == 1
    assert TokenFrequencies.from_corpus((p for p in (a, b)), engine) == f


@pytest.mark.parametrize("content", [b"", b"\xff\n"], ids=repr)
def test_corpus_that_cannot_be_counted(llada, tmp_path, content):
    path = tmp_path / "corpus.txt"
    path.write_bytes(content)
    with pytest.raises(InputError, match=str(path)):
        TokenFrequencies.from_corpus(path, llada)


@pytest.mark.parametrize("paths", ["no-such-file.txt", Path("no-such-file.txt"), ["."], [], 3, [3], None], ids=repr)
def test_wrong_corpus(llada, paths):
    with pytest.raises(InputError, match=r"the corpus .* (cannot be read|is not allowed)"):
        TokenFrequencies.from_corpus(paths, llada)


def test_corpus_without_a_tokenizer(tmp_path):
    engine = Engine.from_pretrained(models.write_model(tmp_path / "model", "llada"))
    (tmp_path / "corpus.txt").write_text("a")
    with pytest.raises(InputError, match="no tokenizer files"):
        TokenFrequencies.from_corpus(tmp_path / "corpus.txt", engine)


# In a generation


def test_generation(engine):
    """Frequent tokens are committed later; a constant frequency below the clip changes no order."""
    fields = {"gen_length": 12, "block_length": 12, "num_transfer_tokens": 1, "stop_at_eos": False}
    size = engine.spec.vocab_size
    plain = engine.generate("Hi", **fields)
    constant = engine.generate("Hi", token_frequencies=TokenFrequencies(np.full(size, 0.5)), **fields)
    assert constant.commit_steps == plain.commit_steps and constant.token_ids == plain.token_ids
    first = plain.token_ids[plain.commit_steps.index(0)]
    values = np.full(size, 1e-6)
    values[first] = 1
    rare = engine.generate("Hi", token_frequencies=TokenFrequencies(values), **fields)
    assert rare.token_ids[rare.commit_steps.index(0)] != first


def test_another_vocabulary(engine):
    size = engine.spec.vocab_size
    config = GenerationConfig(gen_length=4, token_frequencies=TokenFrequencies(np.zeros(size - 1)))
    with pytest.raises(ConfigError, match=f"token_frequencies has {size - 1} entries; .* has {size}"):
        engine.generate("Hi", config)

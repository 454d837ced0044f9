"""Engine.from_pretrained and Engine.generate: prompts of every form, results, statistics, and every wrong argument."""

import ast
import dataclasses
import json
import os
import threading
from pathlib import Path

import models
import numpy as np
import pytest
import torch

import dllm_ext
from dllm_ext import (
    _C,
    CheckpointError,
    ConfigError,
    Engine,
    GenerationConfig,
    InputError,
    Result,
    Stats,
    StepEvent,
    progress,
)
from dllm_ext import engine as engine_module
from dllm_ext.config import native_fields

SHORT = {"gen_length": 6, "block_length": 4}
IDS = [5, 6, 7, 8]
CHAT = [{"role": "user", "content": "Hi"}]


def same(a, b):
    """Results with the same outcome; timings differ."""
    return (a.token_ids, a.prompt_ids, a.nfe, a.text, a.commit_steps) == (
        b.token_ids,
        b.prompt_ids,
        b.nfe,
        b.text,
        b.commit_steps,
    )


def test_public_names():
    assert set(dllm_ext.__all__) >= {"Engine", "GenerationConfig", "PrefixCache", "DualCache", "NoCache", "DLLMError"}
    assert set(dllm_ext.__all__) >= {"D2Cache", "DLLMCache", "TokenFrequencies"}
    assert all(hasattr(dllm_ext, name) for name in dllm_ext.__all__)
    assert dllm_ext.__version__.count(".") == 2


# Loading


def test_attributes(folder, engine):
    config = json.loads((folder / "config.json").read_text())
    spec = engine.spec
    assert spec.family == config["model_type"].lower()
    assert (spec.mask_id, spec.eos_id) == (config["mask_token_id"], config["eos_token_id"])
    assert spec.vocab_size == config["vocab_size"]
    assert spec.max_positions == config.get("max_sequence_length", config.get("max_position_embeddings"))
    assert (engine.folder, engine.device, engine.dtype) == (folder, "cpu", "float32")
    sizes = [torch.Size(shape).numel() for _, shape in spec.tensors()]
    assert 4 * sum(sizes[1:]) <= engine.weight_bytes < 5 * sum(sizes)  # the embedding, first, may stay in its file
    assert str(folder) in repr(engine) and spec.family in repr(engine)


def test_path_types(folder):
    for path in (str(folder), folder, str(folder) + "/", os.path.relpath(folder)):
        assert Engine.from_pretrained(path).spec.family


def test_home_folder(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    assert Engine.from_pretrained("~/" + folder.name).folder == folder


@pytest.mark.parametrize("device", ["cuda", "cuda:0", "mps", "", None, torch.device("cuda")], ids=str)
def test_other_devices(folder, device):
    with pytest.raises(ConfigError, match=r'device = .* "cpu"'):
        Engine.from_pretrained(folder, device=device)


def test_torch_device_and_dtype(folder):
    engine = Engine.from_pretrained(folder, device=torch.device("cpu"), dtype=torch.bfloat16)
    assert (engine.device, engine.dtype) == ("cpu", "bfloat16")


@pytest.mark.parametrize("dtype", ["float16", "int8", "bf16", "", None, torch.float64], ids=str)
def test_other_dtypes(folder, dtype):
    with pytest.raises(ConfigError, match=r'dtype = .*"auto", "float32", "bfloat16"'):
        Engine.from_pretrained(folder, dtype=dtype)


@pytest.mark.parametrize("quantization", ["int2", 4, False], ids=repr)
def test_quantization(folder, quantization):
    with pytest.raises(ConfigError, match=f"quantization = {quantization!r} .*None"):
        Engine.from_pretrained(folder, quantization=quantization)


@pytest.mark.parametrize("path", [None, 3, b"x", ["mini-llada"]], ids=repr)
def test_path_of_wrong_type(path):
    with pytest.raises(ConfigError, match="path_or_repo"):
        Engine.from_pretrained(path)


@pytest.mark.parametrize("family", models.FAMILIES)
@pytest.mark.parametrize(
    ("stored", "isa", "expected"),
    [
        (torch.bfloat16, "avx512_bf16", "bfloat16"),
        (torch.bfloat16, "avx512", "float32"),
        (torch.float32, "avx512_bf16", "float32"),
    ],
    ids=str,
)
def test_auto_dtype(tmp_path, family, stored, isa, expected, monkeypatch):
    models.write_model(tmp_path, family, dtype=stored, shards=2)
    monkeypatch.setattr(engine_module._C, "info", lambda: {"isa": isa})
    assert Engine.from_pretrained(tmp_path).dtype == expected


def test_auto_dtype_of_mixed_weights_is_float32(tmp_path, monkeypatch):
    config = models.llada_config()
    tensors = {name: t.bfloat16() for name, t in models.random_tensors(config).items()}
    tensors["model.transformer.ln_f.weight"] = tensors["model.transformer.ln_f.weight"].float()
    models.write_folder(tmp_path, config, tensors)
    monkeypatch.setattr(engine_module._C, "info", lambda: {"isa": "avx512_bf16"})
    assert Engine.from_pretrained(tmp_path).dtype == "float32"


def test_float16_weights_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="F16; F32 and BF16 are supported"):
        Engine.from_pretrained(models.write_model(tmp_path, "llada", dtype=torch.float16))


def test_bundled_model_answers():
    engine = Engine.from_pretrained("mini-llada")
    assert engine.spec.family == "llada" and engine.tokenizer.has_chat_template
    question = "Tom has 3 apples. He buys 4 more. How many apples does Tom have now?"
    for cache in ("none", "prefix", "dual"):
        result = engine.generate(question, gen_length=64, cache=cache)
        assert result.text.endswith("#### 7") and len(result.token_ids) == 64


class Terminal:
    """stderr as a terminal that remembers what was written."""

    encoding = "utf-8"

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text
        return len(text)

    def flush(self):
        pass

    def isatty(self):
        return True


@pytest.mark.parametrize(("seconds", "shown"), [(0, True), (1e9, False)])
def test_progress_bar_appears_on_long_loads_only(folder, monkeypatch, seconds, shown):
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setattr(progress, "AFTER_SECONDS", seconds)
    Engine.from_pretrained(folder)
    assert (f"loading {folder.name}" in terminal.text) == shown


def test_no_progress_bar_without_a_terminal(folder, capfd, monkeypatch):
    monkeypatch.setattr(progress, "AFTER_SECONDS", 0)
    Engine.from_pretrained(folder)
    assert capfd.readouterr() == ("", "")


# Prompts


def test_prompt_forms_give_the_same_result(engine):
    reference = engine.generate(IDS, **SHORT)
    assert isinstance(reference, Result)
    for prompt in (
        tuple(IDS),
        np.array(IDS),
        np.array(IDS, dtype=np.int32),
        [np.int64(i) for i in IDS],
        torch.tensor(IDS),
    ):
        assert same(engine.generate(prompt, **SHORT), reference)
    for prompts in ([IDS], (IDS,), [tuple(IDS)], np.array([IDS]), [np.array(IDS)], [torch.tensor(IDS)]):
        results = engine.generate(prompts, **SHORT)
        assert isinstance(results, list) and len(results) == 1
        assert same(results[0], reference)
    assert reference.prompt_ids == IDS


def test_text_is_a_user_message_where_there_is_a_chat_template(engine):
    message = [{"role": "user", "content": "Hi"}]
    assert engine.encode("Hi") == engine.encode(message) == engine.encode("Hi", chat=True)
    assert engine.encode("Hi", chat=False) == engine.tokenizer.encode("Hi")
    assert len(engine.encode("Hi")) > 2 == len(engine.encode("Hi", chat=False))
    assert engine.generate("Hi", **SHORT).prompt_ids == engine.encode(message)
    assert engine.generate("Hi", chat=False, **SHORT).prompt_ids == engine.tokenizer.encode("Hi")


def test_text_is_plain_where_there_is_none(tmp_path):
    from conftest import write_tokenizer

    engine = Engine.from_pretrained(models.write_model(tmp_path, "llada"))
    write_tokenizer(tmp_path, "llada", chat_template=None)
    assert engine.encode("Hi") == engine.tokenizer.encode("Hi")
    assert engine.encode("Hi", chat=True) == engine.encode([{"role": "user", "content": "Hi"}])


def test_list_of_different_forms_keeps_the_order(engine):
    prompts = ["one", IDS, CHAT, np.array([9, 10]), ("two")]
    results = engine.generate(prompts, **SHORT)
    assert len(results) == 5
    for prompt, result in zip(prompts, results, strict=True):
        assert same(result, engine.generate(prompt, **SHORT))


def test_empty_list(engine):
    assert engine.generate([], **SHORT) == []
    assert engine.generate((), **SHORT) == []


def test_empty_prompt_of_llada(llada):
    (result,) = llada.generate([[]], **SHORT)
    assert result.prompt_ids == [] and len(result.token_ids) == 6


def test_empty_prompt_of_dream(tmp_path):
    engine = Engine.from_pretrained(models.write_model(tmp_path, "dream"))
    with pytest.raises(InputError, match="prompt 1 is empty"):
        engine.generate([IDS, []], **SHORT)


@pytest.mark.parametrize(
    "prompt", [None, 3, 1.5, {"role": "user", "content": "x"}, object(), b"bytes", {1, 2}], ids=str
)
def test_wrong_prompt(engine, prompt):
    with pytest.raises(InputError, match=r"prompt 0 is .*text, token ids or chat messages"):
        engine.generate(prompt, **SHORT)


@pytest.mark.parametrize("bad", [1.5, True, None, "x", np.float32(1), np.True_], ids=repr)
def test_wrong_id(engine, bad):
    with pytest.raises(InputError, match="prompt 1"):
        engine.generate([IDS, [1, 2, bad]], **SHORT)


def test_wrong_id_is_named(engine):
    with pytest.raises(InputError, match=r"prompt 0 holds 1\.5 at position 2"):
        engine.generate([1, 2, 1.5], **SHORT)


@pytest.mark.parametrize("beyond", [0, 1, 2**31, 2**70])
def test_id_outside_the_vocabulary(engine, beyond):
    size = engine.spec.vocab_size
    with pytest.raises(
        InputError, match=rf"prompt 1 holds the id {size + beyond} at position 3.*between 0 and {size - 1}"
    ):
        engine.generate([IDS, [1, 2, 3, size + beyond]], **SHORT)
    assert len(engine.generate([1, 2, 3, size - 1], **SHORT).token_ids) == 6


def test_negative_id(engine):
    with pytest.raises(InputError, match="prompt 0 holds the id -1 at position 0"):
        engine.generate([-1, 2], **SHORT)


def test_messages_mixed_with_other_things(engine):
    with pytest.raises(InputError, match="message 1 is a str"):
        engine.encode([CHAT[0], "text"])
    with pytest.raises(InputError, match="message 0 is a int"):
        engine.encode([1, CHAT[0]])


def test_context_limit(tmp_path):
    engine = Engine.from_pretrained(models.write_model(tmp_path, "llada", max_sequence_length=10))
    assert len(engine.generate([1, 2, 3, 4], gen_length=6).token_ids) == 6
    with pytest.raises(InputError, match=r"prompt 1 has 5 tokens.*gen_length = 6.*11 positions.*10"):
        engine.generate([[1, 2, 3, 4], [1, 2, 3, 4, 5]], gen_length=6)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("infill", "yes", "infill = 'yes'"),
        ("infill", 1, "True or False"),
        ("chat", "yes", "chat = 'yes'"),
        ("batch_size", 0, "batch_size = 0"),
        ("batch_size", -3, "at least 1"),
        ("batch_size", 2.0, "batch_size = 2.0"),
        ("batch_size", None, "batch_size = None"),
        ("batch_size", 2**80, "batch_size = "),
        ("on_step", 5, "on_step = 5"),
        ("config", {"gen_length": 4}, "must be a GenerationConfig"),
        ("config", "prefix", "config = 'prefix'"),
        ("max_tokens", 1, "'max_tokens' is not a field"),
        ("gen_length", "many", "gen_length = 'many'"),
        ("gen_length", 0, "gen_length = 0"),
    ],
)
def test_wrong_arguments(engine, name, value, words):
    with pytest.raises(ConfigError, match=words):
        engine.generate(IDS, **(SHORT | {name: value}))


def test_fields_override_the_config(engine):
    config = GenerationConfig(gen_length=4, num_transfer_tokens=1, stop_at_eos=False)
    assert len(engine.generate(IDS, config).token_ids) == 4
    result = engine.generate(IDS, config, gen_length=6, num_transfer_tokens=2)
    assert len(result.token_ids) == 6 and result.nfe == 3
    with pytest.raises(ConfigError, match="give one"):
        engine.generate(IDS, GenerationConfig(steps=4), threshold=0.5)


# Results


def test_result_is_plain_data(engine):
    result = engine.generate(IDS, **SHORT)
    assert isinstance(result.stats, Stats) and result.nfe == result.stats.nfe
    assert all(type(i) is int for i in result.token_ids + result.prompt_ids + result.commit_steps)
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.text = "x"
    data = json.loads(json.dumps(result.to_dict()))
    assert data["token_ids"] == result.token_ids
    assert data["stats"]["tokens_per_second"] == result.stats.tokens_per_second
    assert set(data["stats"]) >= {"rows", "nfe", "tokens", "ms_per_forward", "time_to_first_block", "seconds_total"}


def fake_result(token_ids, **stats):
    lists = ("rows", "layer_rows", "verify_rows", "logit_rows", "attention_pairs", "weight_bytes", "commits")
    values = {"seconds": [0.1, 0.3], "selection_seconds": [0.0, 0.0], "seconds_total": 0.5, "seconds_first_block": 0.2}
    values |= {name: [3, 4] for name in (*lists, "buffer_bytes")} | stats

    class Fake:
        prompt_ids, nfe, commit_steps = [1], 2, [0] * len(token_ids)

    Fake.token_ids, Fake.stats = token_ids, values
    return Fake


@pytest.mark.parametrize(("at", "tokens"), [(0, 0), (2, 2), (None, 5)])
def test_statistics_count_tokens_before_the_first_stop_id(engine, at, tokens):
    ids = [5, 6, 7, 8, 9]
    if at is not None:
        ids[at:] = [engine.spec.eos_id] * (5 - at)
    stats = engine._result(fake_result(ids), None).stats
    assert stats.tokens == tokens
    assert stats.tokens_per_second == tokens / 0.5
    assert stats.tokens_per_forward == tokens / 2
    assert stats.ms_per_forward == pytest.approx(200)
    assert stats.time_to_first_block == 0.2


def test_statistics_of_nothing_are_zero(engine):
    fake = fake_result([], seconds=[], seconds_total=0.0)
    fake.nfe = 0
    stats = engine._result(fake, None).stats
    assert (stats.tokens_per_second, stats.tokens_per_forward, stats.ms_per_forward) == (0, 0, 0)


def test_per_step_lists(engine):
    result = engine.generate(IDS, gen_length=8, block_length=4, num_transfer_tokens=2, cache="dual", stop_at_eos=False)
    s = result.stats
    assert result.nfe == 4
    assert all(
        len(getattr(s, name)) == 4 for name in ("rows", "logit_rows", "attention_pairs", "weight_bytes", "seconds")
    )
    assert s.commits == [2, 2, 2, 2] and sum(s.commits) == 8
    assert s.rows == [12, 4, 12, 4]
    assert s.layer_rows == [engine.spec.n_layers * n for n in s.rows] and s.verify_rows == [0, 0, 0, 0]
    assert all(0 < b <= 1.01 * engine.weight_bytes for b in s.weight_bytes)
    assert s.buffer_bytes[0] > 0 and s.buffer_bytes[1:] == [0, 0, 0]
    assert 0 < s.time_to_first_block <= s.seconds_total
    assert 0.5 * sum(s.seconds) <= s.seconds_total


def test_text_ends_at_the_first_stop_id(llada):
    tokenizer = llada.tokenizer
    ids = [*tokenizer.encode("one"), llada.spec.eos_id, *tokenizer.encode("two")]
    result = llada._result(fake_result(ids), tokenizer)
    assert result.text == "one" and len(result.token_ids) == 7 and result.stats.tokens == 3


def eos_only(tensors):
    """Make EOS (id 291) the best token of every row: the last norm gives the same vector for all of them."""
    tensors["model.transformer.wte.weight"].fill_(1.0)
    for name, t in tensors.items():
        if name.endswith(
            ("attn_out.weight", "blocks.0.ff_out.weight", "blocks.1.ff_out.weight", "blocks.2.ff_out.weight")
        ):
            t.zero_()
    tensors["model.transformer.ln_f.weight"].fill_(1.0)
    head = tensors["model.transformer.ff_out.weight"]
    head.zero_()
    head[291] = 1.0


def test_immediate_end(tmp_path):
    from conftest import write_tokenizer

    models.write_model(tmp_path, "llada", edit=eos_only)
    write_tokenizer(tmp_path, "llada")
    result = Engine.from_pretrained(tmp_path).generate("Hi", gen_length=64, block_length=8, num_transfer_tokens=1)
    assert result.text == "" and result.token_ids == [291] * 64
    assert result.stats.tokens == 0 and result.stats.tokens_per_second == 0
    assert result.nfe == result.commit_steps[0] + 1 <= 8
    assert result.commit_steps.count(-1) == 64 - result.nfe
    everything = Engine.from_pretrained(tmp_path).generate("Hi", gen_length=16, block_length=8, stop_at_eos=False)
    assert -1 not in everything.commit_steps


# Infilling


def test_infill(engine):
    mask = engine.spec.mask_id
    prompt = [5, mask, 7, mask, 9]
    as_data = engine.generate(prompt, **SHORT)
    assert as_data.prompt_ids == prompt
    filled = engine.generate(prompt, infill=True, **SHORT)
    assert mask not in filled.prompt_ids
    assert [filled.prompt_ids[i] for i in (0, 2, 4)] == [5, 7, 9]
    assert len(filled.commit_steps) == 6


def test_infill_text_is_taken_as_it_stands(engine):
    mask = engine.tokenizer.pieces([engine.spec.mask_id])[0]
    result = engine.generate(f"a{mask}b", infill=True, gen_length=0)
    assert result.token_ids == [] and len(result.prompt_ids) == 3
    assert result.prompt_ids[1] != engine.spec.mask_id
    assert len(engine.generate(f"a{mask}b", infill=True, chat=True, **SHORT).prompt_ids) > 3


# Callbacks


def test_events_rebuild_the_result(engine):
    prompts = [IDS, [9, 10, 11], [12]]
    events = []
    config = GenerationConfig(gen_length=9, block_length=4, num_transfer_tokens=2, stop_at_eos=False)
    results = engine.generate(prompts, config, batch_size=2, on_step=lambda e: events.append(e))
    assert all(isinstance(e, StepEvent) for e in events)
    for index, result in enumerate(results):
        own = [e for e in events if e.sequence == index]
        assert [e.step for e in own] == list(range(result.nfe))
        assert [e.block for e in own] == sorted(e.block for e in own) and own[-1].block == 2
        assert [e.rows for e in own] == result.stats.rows
        assert [len(e.positions) for e in own] == result.stats.commits
        length = len(prompts[index])
        first_of_block = [i == 0 or own[i - 1].block != e.block for i, e in enumerate(own)]
        assert [e.is_full for e in own] == [e.rows == length + 9 for e in own]
        assert all(e.is_full for e, first in zip(own, first_of_block, strict=True) if first)
        tokens, steps = [None] * 9, [None] * 9
        for e in own:
            for position, token in zip(e.positions, e.token_ids, strict=True):
                tokens[position - length], steps[position - length] = token, e.step
        assert (tokens, steps) == (result.token_ids, result.commit_steps)


@pytest.mark.parametrize("answer", [None, True, 1, 0, "stop"], ids=repr)
def test_only_false_stops(engine, answer):
    assert same(engine.generate(IDS, on_step=lambda e: answer, **SHORT), engine.generate(IDS, **SHORT))


# Batches and threads


def test_results_do_not_depend_on_the_batch(engine):
    prompts = [[3 + i] * (1 + i % 5) for i in range(7)]
    config = GenerationConfig(gen_length=9, block_length=4, temperature=0.7, seed=5)
    alone = [engine.generate(p, config) for p in prompts]
    for batch_size in (1, 3, np.int64(8)):
        together = engine.generate(prompts, config, batch_size=batch_size)
        assert all(same(a, b) for a, b in zip(alone, together, strict=True))


def test_results_do_not_depend_on_the_number_of_threads(engine):
    prompts = [IDS, [9, 10, 11], IDS * 20]
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(engine.generate(prompts, gen_length=24, temperature=0.7, threshold=0.3, stop_at_eos=False))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(same(a, b) for a, b in zip(results[0], other, strict=True))


def test_threads_take_turns(llada):
    prompts = [[i + 1, i + 2] for i in range(4)]
    expected = [llada.generate(p, **SHORT) for p in prompts]
    results = [None] * 4

    def work(i):
        results[i] = llada.generate(prompts[i], **SHORT)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(60)
    assert all(same(a, b) for a, b in zip(results, expected, strict=True))


def test_the_engine_outlives_its_files(tmp_path):
    """The weights stay mapped when the folder is deleted."""
    folder = models.write_model(tmp_path / "model", "llada")
    engine = Engine.from_pretrained(folder)
    before = engine.generate(IDS, **SHORT)
    for file in folder.iterdir():
        file.unlink()
    assert engine.generate(IDS, **SHORT).token_ids == before.token_ids


def test_native_dict_is_the_config():
    """What generate() hands to the native code are the fields themselves."""
    assert _C.validate_config(native_fields(GenerationConfig(cache="dual", steps=4)))["cache"] == "dual"


def test_the_stub_describes_the_native_module():
    """_C.pyi declares what exists, and all of it but the modules for tests."""
    stub = ast.parse((Path(dllm_ext.__file__).parent / "_C.pyi").read_text())
    declared = {}
    for node in stub.body:
        if isinstance(node, ast.FunctionDef):
            declared[node.name] = set()
        if isinstance(node, ast.ClassDef) and not node.bases:
            names = [n.target.id if isinstance(n, ast.AnnAssign) else getattr(n, "name", "_") for n in node.body]
            declared[node.name] = {n for n in names if not n.startswith("_")}
    public = {n for n in dir(_C) if not n.startswith("_") and type(getattr(_C, n)).__name__ != "module"}
    assert set(declared) == public
    for name, members in declared.items():
        if isinstance(getattr(_C, name), type):
            assert members == {n for n in dir(getattr(_C, name)) if not n.startswith("_")}


def test_missing_model_names_what_is_bundled():
    with pytest.raises(CheckpointError, match="mini-llada"):
        Engine.from_pretrained("no-such-model")

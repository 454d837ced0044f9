"""benchmarks/compare.py: a step's timer, the roofline's arithmetic, groups, tables, and the worker protocol."""

import csv
import sys
from pathlib import Path

import pytest
import torch

from dllm_ext import _C, Engine, UsageError

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
pytestmark = pytest.mark.skipif(not BENCHMARKS.is_dir(), reason="needs the source tree")
sys.path.insert(0, str(BENCHMARKS))
pytest.importorskip("tqdm")

import compare  # noqa: E402
import random_model  # noqa: E402
import roofline  # noqa: E402
import tables  # noqa: E402
from peers import PROGRAMS, loop  # noqa: E402
from peers.process import PeerError, Process  # noqa: E402
from torch_baseline import TorchLLaDA  # noqa: E402

MINI = compare.MINI
SHAPE = roofline.Shape(d_model=64, n_layers=3, n_heads=4, n_kv_heads=2, mlp_hidden=160, vocab_size=1000)
PEAKS = {"float32": 1e9, "bfloat16": 2e9, "int8": 4e9, "read": 1e6}


@pytest.fixture(scope="module")
def mini():
    return Engine.from_pretrained(MINI, dtype="float32")


# --- time_steps -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows, keys", [(1, 1), (1, 40), (17, 40), (40, 40)])
def test_time_steps_gives_one_time_per_step(mini, rows, keys):
    seconds = _C.ops.time_steps(mini._native, rows, keys, repeats=3)
    assert len(seconds) == 3 and all(0 < s < 10 for s in seconds)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((0, 40, 1), r"rows = 0 .* between 1 and 40"),
        ((41, 40, 1), r"rows = 41 .* between 1 and 40"),
        ((1, 0, 1), r"keys = 0 .* between 1 and"),
        ((1, 10**6, 1), r"keys = 1000000 .* between 1 and"),
        ((1, 40, 0), r"repeats = 0 .* between 1 and"),
    ],
)
def test_time_steps_names_the_wrong_argument(mini, arguments, message):
    with pytest.raises(UsageError, match=message):
        _C.ops.time_steps(mini._native, *arguments)


# --- roofline ---------------------------------------------------------------------------------------------------------


def test_linear_weights_are_those_of_the_model(mini):
    shape = roofline.Shape.from_config(compare.load_config(MINI))
    sizes = [n for _, n in mini.spec.tensors() if len(n) == 2]
    embedding = mini.spec.vocab_size * mini.spec.d_model
    assert shape.linear_weights == sum(a * b for a, b in sizes) - embedding


def test_forward_work_by_hand():
    layer = 64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 160
    linear = 3 * layer + 64 * 1000
    work = roofline.forward_work(SHAPE, rows=5, keys=20, precision="bfloat16")
    assert work.bytes == 2 * linear + 2 * 3 * 32 * 20 * 2
    assert work.operations == 2 * 5 * (linear + 3 * 2 * 64 * 20)


def test_the_floor_is_what_binds():
    assert roofline.Work(bytes=3e6, operations=1).floor(PEAKS, "float32") == 3
    assert roofline.Work(bytes=1, operations=8e9).floor(PEAKS, "bfloat16") == 4
    assert roofline.Work(bytes=1, operations=8e9).floor(PEAKS, "int4") == 2  # the roof of int8


def test_generation_floor_of_whole_steps_is_that_of_forwards(mini):
    """Where every row's logits are wanted, a generation's step is a forward."""
    rows, keys = 7, 20
    counters = {
        "rows": [rows] * 2,
        "layer_rows": [rows * SHAPE.n_layers] * 2,
        "logit_rows": [rows] * 2,
        "attention_pairs": [rows * keys * SHAPE.n_layers] * 2,
        "weight_bytes": [SHAPE.linear_weights * 4] * 2,
    }
    floor = roofline.generation_floor(SHAPE, counters, keys, PEAKS, "float32")
    work = roofline.forward_work(SHAPE, rows, keys, "float32")
    assert floor == pytest.approx(2 * work.floor(PEAKS, "float32"))


# --- groups and tables ------------------------------------------------------------------------------------------------


def programs(*names):
    return [PROGRAMS[n] for n in names]


def test_what_fits_together_is_one_group():
    chosen = programs("torch bf16", "dllm_ext bf16", "llama.cpp Q8_0", "dllm_ext int8")
    groups, reasons = compare.groups_of(chosen, parameters=10**9, limit=100e9)
    assert [[p.name for p in g] for g in groups] == [["dllm_ext bf16", "dllm_ext int8", "torch bf16", "llama.cpp Q8_0"]]
    assert not reasons


def test_groups_are_of_one_precision_and_begin_with_its_engine():
    chosen = programs("torch bf16", "dllm_ext fp32", "dllm_ext bf16", "torch fp32", "llama.cpp Q8_0")
    groups, reasons = compare.groups_of(chosen, parameters=10**9, limit=15e9)
    assert [[p.name for p in g] for g in groups] == [
        ["dllm_ext fp32", "torch fp32"],
        ["dllm_ext bf16", "torch bf16"],
        ["llama.cpp Q8_0"],
    ]
    assert not reasons


def test_groups_that_do_not_fit_are_split_and_what_never_fits_is_named():
    chosen = programs("dllm_ext bf16", "torch bf16", "transformers bf16", "dllm_ext fp32", "torch fp32")
    groups, reasons = compare.groups_of(chosen, parameters=10**9, limit=7e9)  # three of bf16, one of fp32
    assert [[p.name for p in g] for g in groups] == [
        ["dllm_ext fp32"],
        ["dllm_ext bf16", "torch bf16"],
        ["dllm_ext bf16", "transformers bf16"],
    ]
    assert list(reasons) == ["torch fp32"] and "12 GB" in reasons["torch fp32"]


def forward(program, case, repeat, seconds, floor=0.5):
    p = PROGRAMS[program]
    return tables.Sample("forward", program, p.precision, case, 0, repeat, seconds, floor=floor)


def test_ratios_are_taken_repeat_by_repeat():
    times = {"dllm_ext bf16": [1.0, 2.0, 4.0], "torch bf16": [2.0, 3.0, 20.0]}
    samples = [forward(p, 8, i, s) for p, t in times.items() for i, s in enumerate(t)]
    engine, torch_line = tables.summarise(samples, gen_length=0)
    assert engine.ratios == [1, 1, 1] and torch_line.ratios == [2.0, 1.5, 5.0]
    assert torch_line.ratio == "2.00 (1.50–5.00)"
    assert (torch_line.ms, torch_line.per_second) == (3000, 8 / 3)
    assert torch_line.roof == pytest.approx(0.5 / 3)


def test_the_engine_against_the_best_of_a_family():
    times = {
        "dllm_ext int8": [1.0, 2.0],
        "llama.cpp BF16": [3.0, 9.0],
        "llama.cpp Q4_0": [4.0, 8.0],
        "torch bf16": [5.0, 5.0],
    }
    samples = [forward(p, 8, i, s) for p, t in times.items() for i, s in enumerate(t)]
    ratios = tables.against_families(samples)
    assert ratios["dllm_ext int8", "llama.cpp at any precision"] == {8: [3.0, 4.0]}
    assert ratios["dllm_ext int8", "torch at any precision"] == {8: [5.0, 2.5]}


def test_a_program_without_a_cache_takes_its_one_time_everywhere():
    samples = [forward("dllm_ext bf16", 1, 0, 1.0, floor=0.1), forward("dllm_ext bf16", 320, 0, 2.0)]
    samples.append(forward("transformers bf16", 320, 0, 3.0))
    lines = tables.summarise(tables.with_whole_forwards(samples, {"transformers bf16"}, [1, 320]), gen_length=0)
    found = {(x.program, x.case): x for x in lines}
    assert found["transformers bf16", 1].ratios == [3.0]
    assert found["transformers bf16", 1].per_second == pytest.approx(1 / 3)
    assert found["transformers bf16", 1].roof == pytest.approx(0.1 / 3)


def test_missing_programs_are_listed_with_their_reason(tmp_path):
    samples = [forward("dllm_ext bf16", 320, 0, 1.0)]
    loaded = {
        "dllm_ext bf16": {"caches": ["none", "dual"], "seconds": 1.0, "bytes_loading": 2e9, "bytes": 1e9, "idle": 0.0}
    }
    reasons = {"llama.cpp Q8_0": "llama_cpp is not installed"}
    report = tables.Report("settings", samples, loaded, reasons, 320, 128, [320])
    assert "| llama.cpp Q8_0 | llama_cpp is not installed |" in report.markdown()
    report.write_csv(tmp_path / "t.csv")
    with open(tmp_path / "t.csv") as f:
        rows = list(csv.DictReader(f))
    assert [(r["kind"], r["program"]) for r in rows] == [
        ("forward", "dllm_ext bf16"),
        ("load", "dllm_ext bf16"),
        ("missing", "llama.cpp Q8_0"),
    ]
    assert rows[0]["ratio"] == "1.0" and rows[2]["reason"] == "llama_cpp is not installed"


# --- workers ----------------------------------------------------------------------------------------------------------


def test_worker_protocol(mini):
    arguments = {"folder": str(MINI), "precision": "float32", "threads": 1}
    prompt = list(range(10, 30))
    request = {"prompt": prompt, "gen_length": 16, "block_length": 8, "per_step": 2, "cache": "dual"}
    with Process(threads=1) as p:
        with pytest.raises(PeerError, match="quantum is not installed"):
            p.ask("load", module="quantum", arguments=arguments)
        loaded = p.ask("load", module="engine", arguments=arguments)
        assert loaded["seconds"] > 0 and loaded["bytes_loading"] > 1e7 and "d2" in loaded["caches"]
        assert len(p.ask("forward", rows=4, keys=32, repeats=2)["seconds"]) == 2
        with pytest.raises(PeerError, match=r"rows = 33 .* between 1 and 32"):
            p.ask("forward", rows=33, keys=32, repeats=1)
        answer = p.ask("generate", **request)
        assert p.ask("memory")["bytes"] > 1e7
    fields = {**request, "num_transfer_tokens": request.pop("per_step"), "stop_at_eos": False}
    del fields["per_step"], fields["prompt"]
    expected = mini.generate(prompt, **fields)
    assert answer["token_ids"] == expected.token_ids and answer["nfe"] == expected.nfe
    assert len(answer["counters"]["rows"]) == expected.nfe


def test_a_worker_that_dies_says_so():
    with Process(threads=1) as p:
        p.process.kill()
        with pytest.raises(PeerError, match="exited with -9"):
            p.ask("memory")


# --- the torch programs' loop -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
def test_the_loop_commits_what_the_engine_does(mini, cache):
    model = TorchLLaDA(MINI, torch.float32)
    prompt = list(range(40, 60))
    tokens, steps = loop.generate(model, prompt, gen_length=24, block_length=8, per_step=1, cache=cache)
    r = mini.generate(prompt, gen_length=24, block_length=8, num_transfer_tokens=1, cache=cache, stop_at_eos=False)
    assert tokens == r.token_ids
    assert [rows for rows, _ in steps] == r.stats.rows


# --- random models ----------------------------------------------------------------------------------------------------


def test_numbers_from_the_table_go_round(monkeypatch):
    monkeypatch.setattr(random_model, "TABLE", 101)
    source = random_model.FromTable(seed=3)
    values = torch.cat([source.normal(7, 11).flatten(), source.normal(200)])
    assert torch.equal(values, source.table.repeat(3)[: len(values)])


def test_a_sharded_random_model_loads(tmp_path, monkeypatch):
    sizes = {"d_model": 64, "n_layers": 2, "n_heads": 2, "mlp_hidden_size": 96, "vocab_size": 300}
    monkeypatch.setattr(random_model, "SHARD_BYTES", 40_000)
    monkeypatch.setattr(random_model, "SHARDED_PARAMETERS", 0)
    monkeypatch.setitem(random_model.SHAPES, "tiny", sizes)
    folder = random_model.write_llada(tmp_path, "tiny")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    engine = Engine.from_pretrained(folder, dtype="bfloat16")
    model = TorchLLaDA(folder, torch.bfloat16)
    assert model.head.n == engine.spec.vocab_size == 300
    assert engine.generate([1, 2, 3], gen_length=8, block_length=8).nfe > 0

"""Rung 3: the whole engine on the emulated CUDA device, capture and replay included, against the CPU.

In fp32 the tokens are equal, and so are the steps that committed them and the rows that every step computed. The
emulated stream is lazy by default: work runs as late as the host lets it, so a result that is read too early shows.
"""

import collections
import contextlib
import functools
import itertools

import models
import numpy as np
import pytest
import torch
from emulated_engine import Pair, facts, load_module
from reference import quantized
from safetensors.torch import load_file, save_file

from dllm_ext import D2Cache, DLLMCache, DualCache, GenerationConfig, PrefixCache, TokenFrequencies
from dllm_ext.config import native_fields
from dllm_ext.errors import ConfigError, Interrupted, NumericalError
from dllm_ext.quantize import quantize

module = load_module()
PROMPTS = [[5, 9, 13, 2, 7], [3, 4, 8]]
SHORT = {"gen_length": 16, "block_length": 8, "stop_at_eos": False}

CACHES = {
    "none": "none",
    "prefix": PrefixCache(),
    "dual": DualCache(),
    "dllm": DLLMCache(kp=6, kr=3, rou=0.3),
    "dllm_no_verify": DLLMCache(kp=4, kr=2, rou=0.0),
    "dllm_never_always": DLLMCache(kp=5, kr=2, rou=0.5, always_refresh_layers=[]),
    "d2": D2Cache(current_k=6, sigma=4.0, rollout_p=0.3),
    "d2_wide": D2Cache(current_k=3, sigma=10.0, rollout_p=0.05, inflate_w=0),
}
# Run by the loop on the device.
DECODERS = {
    "threshold": {"threshold": 0.5},
    "count": {"num_transfer_tokens": 3},
    "steps": {"steps": 8},
    "dream_steps": {"steps": 8, "schedule": "dream"},
    "factor": {"factor": 0.9},
    "entropy_bound": {"gamma": 1.5},
    "margin": {"threshold": 0.4, "remasking": "topk_margin"},
    "entropy": {"num_transfer_tokens": 2, "remasking": "entropy"},
    "random": {"num_transfer_tokens": 2, "remasking": "random", "seed": 7},
    "origin": {"steps": 8, "schedule": "dream", "remasking": "origin", "seed": 5},
    "sampled": {"threshold": 0.3, "temperature": 0.8, "seed": 3},
    "sampled_dream": {"steps": 8, "schedule": "dream", "temperature": 0.6, "alg_temp": 0.5, "seed": 11},
    "prior": {"num_transfer_tokens": 2, "sigma": 5.0},
    "decay": {"num_transfer_tokens": 2, "position_decay": 0.2},
    "autoregressive": {"threshold": 0.3, "autoregressive": True},
    "eos": {"threshold": 0.3, "stop_at_eos": True, "confidence_eos_eot_inf": True},
    "no_eos": {"threshold": 0.3, "logits_eos_inf": True},
}
# The host chooses: whole rows of logits, or the quirks of released code.
HOST_DECODERS = {
    "guidance": {"threshold": 0.5, "cfg_scale": 1.0},
    "top_p": {"num_transfer_tokens": 2, "temperature": 1.0, "top_p": 0.8, "seed": 1},
    "top_k": {"threshold": 0.3, "temperature": 1.0, "top_k": 5, "seed": 2},
    "klass": {"threshold": 0.3, "kl_threshold": 0.1},
    "quirks": {"num_transfer_tokens": 2, "reference_quirks": True},
}


def _native(settings):
    return (native_fields(GenerationConfig(**settings)),)


@pytest.fixture(autouse=True)
def schedule():
    module.emulator.configure()
    yield
    module.emulator.configure()


@pytest.fixture(scope="module")
def pair_of(tmp_path_factory):
    @functools.cache
    def make(family, dtype="float32", quantization=None, **changes):
        folder = models.write_model(tmp_path_factory.mktemp(family), family, **changes)
        return Pair(module, folder, dtype, quantization)

    return make


def agree(results):
    cpu, cuda = results
    assert [facts(r) for r in cuda] == [facts(r) for r in cpu]
    return cuda


def _allowed(caches, decoders):
    """Combinations that GenerationConfig allows."""
    for (cache, policy), (decoder, settings) in itertools.product(caches.items(), decoders.items()):
        with contextlib.suppress(ConfigError):
            GenerationConfig(cache=policy, **(SHORT | settings))
            yield cache, decoder


@pytest.mark.parametrize(("cache", "decoder"), list(_allowed(CACHES, DECODERS)))
@pytest.mark.parametrize("family", models.FAMILIES)
def test_device_loop(pair_of, family, cache, decoder):
    agree(pair_of(family).generate(PROMPTS, cache=CACHES[cache], **(SHORT | DECODERS[decoder])))


@pytest.mark.parametrize(
    ("cache", "decoder"),
    list(_allowed({name: CACHES[name] for name in ("none", "prefix", "dual", "dllm", "d2")}, HOST_DECODERS)),
)
@pytest.mark.parametrize("family", models.FAMILIES)
def test_host_loop(pair_of, family, cache, decoder):
    batch_size = 1 if decoder == "quirks" else 8  # the released code pads batches of equal lengths only
    settings = SHORT | HOST_DECODERS[decoder]
    agree(pair_of(family).generate(PROMPTS, cache=CACHES[cache], batch_size=batch_size, **settings))


def test_token_frequencies(pair_of):
    """PC-Sampler's table lies on the device."""
    pair = pair_of("llada")
    frequencies = np.random.default_rng(0).dirichlet(np.ones(pair.cpu.spec.vocab_size)).tolist()
    agree(
        pair.generate(
            PROMPTS, cache="dual", num_transfer_tokens=2, token_frequencies=TokenFrequencies(frequencies), **SHORT
        )
    )


@pytest.mark.parametrize("cache", ["none", "prefix", "dual", "dllm", "d2"])
@pytest.mark.parametrize("family", models.FAMILIES)
def test_infill_and_ragged_batches(pair_of, family, cache):
    """More prompts than places, of very different lengths, with positions to fill; one place is the same."""
    pair = pair_of(family)
    mask = pair.cpu.spec.mask_id
    prompts = [[5, mask, 13, mask, mask, 7, 8], [3], list(range(20, 60)), [4, 4, mask, 9, 2]]
    settings = {"gen_length": 12, "block_length": 5, "threshold": 0.4, "cache": cache, "stop_at_eos": True}
    together = agree(pair.generate(prompts, batch_size=3, infill=True, **settings))
    alone = pair.cuda.generate(prompts, True, *_native(settings), 1)
    assert [r.token_ids for r in alone] == [r.token_ids for r in together]


@pytest.mark.parametrize("family", models.FAMILIES)
def test_log_probs(pair_of, family):
    """Of a new engine, after a smaller sequence, and between generations."""
    pair = pair_of(family)
    tokens = [(11 * i + 3) % 250 for i in range(60)]
    for length, hidden in ((9, [3]), (60, [1, 2, 30, 59]), (12, list(range(1, 12)))):
        cpu, cuda = (e.log_probs([tokens[:length], tokens[:5]], [hidden, [4]]) for e in (pair.cpu, pair.cuda))
        assert [len(x) for x in cuda] == [len(hidden), 1]
        for a, b in zip(cpu, cuda, strict=True):
            assert b == pytest.approx(a, abs=1e-4)
        agree(pair.generate(PROMPTS, cache="dual", **SHORT))


@pytest.mark.parametrize(
    ("order", "copies", "queue"),
    list(itertools.product(["fifo", "lifo", "random"], ["late", "early"], ["lazy", "eager"])),
)
def test_schedules(pair_of, order, copies, queue):
    """Neither the order of threads nor when copies land nor when the stream runs changes a result."""
    pair = pair_of("dream")
    module.emulator.configure(order=order, seed=3, copies=copies, queue=queue)
    for cache in ("dual", "dllm", "d2"):
        agree(pair.generate(PROMPTS, cache=cache, **(SHORT | {"threshold": 0.5, "gen_length": 8, "block_length": 4})))


@pytest.mark.parametrize("cache", ["none", "prefix", "dual", "dllm", "d2"])
def test_graphs_change_nothing(monkeypatch, tmp_path, cache):
    """DLLM_CUDA_GRAPHS=0 launches every step anew."""
    with_graphs = Pair(module, models.write_model(tmp_path / "model", "llada"))
    settings = SHORT | {"threshold": 0.5, "cache": cache}
    with_graphs.generate(PROMPTS, **settings)
    a = agree(with_graphs.generate(PROMPTS, **settings))  # every shape comes up for the second time
    counts = module.emulator.counters()
    monkeypatch.setenv("DLLM_CUDA_GRAPHS", "0")
    without = Pair(module, tmp_path / "model")
    b = agree(without.generate(PROMPTS, **settings))
    assert module.emulator.counters()["graph_launches"] == 0
    assert [facts(r) for r in a] == [facts(r) for r in b]
    assert counts["graph_launches"] >= a[0].nfe


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("quantization", [None, "int8", "int4"])
def test_16_bit_and_quantised(tmp_path, dtype, quantization):
    """No token parity with the CPU is promised here; the pipeline runs, in two schedules with the same bits."""
    shape = dict(d_model=128, n_heads=2, n_kv_heads=2, mlp_hidden_size=192, vocab_size=304, embedding_size=304)
    engine = module.Engine(
        str(models.write_model(tmp_path / "model", "llada", **shape)), dtype, quantization, None, "cuda"
    )
    fields = _native(SHORT | {"gen_length": 8, "threshold": 0.5, "cache": "d2"})
    results = []
    for order in ("fifo", "random"):
        module.emulator.configure(order=order, seed=9)
        results.append([facts(r) for r in engine.generate(PROMPTS, False, *fields, 8)])
    assert results[0] == results[1]


def test_uncut_and_cut_keys(tmp_path):
    """The full pass of the batch has more (row, head) pairs than attention cuts keys for; its other steps, and all
    steps of a prompt alone, have fewer."""
    shape = dict(n_layers=1, d_model=512, n_heads=8, n_kv_heads=1, mlp_hidden_size=64, vocab_size=304)
    folder = models.write_model(tmp_path / "model", "llada", **shape, embedding_size=304)
    engine = module.Engine(str(folder), "bfloat16", None, None, "cuda")
    settings = {"gen_length": 4, "block_length": 4, "cache": "dual", "num_transfer_tokens": 2, "stop_at_eos": False}
    prompts = [[i % 200 for i in range(256 + s)] for s in range(4)]
    assert sum(len(p) + 4 for p in prompts) * 8 > 8192
    together, alone = (engine.generate(prompts, False, *_native(settings), n) for n in (4, 1))
    assert [facts(r) for r in alone] == [facts(r) for r in together]


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_quantised_weights_in_fp32(tmp_path, quantization):
    """W8 and W4 against fp32 activations: the tokens of the CPU with the same weights written out in fp32, whether the
    checkpoint is quantised or becomes so while it loads."""
    shape = dict(d_model=64, n_heads=2, n_kv_heads=2, mlp_hidden_size=128, vocab_size=304, embedding_size=304)
    folder = models.write_model(tmp_path / "model", "llada", **shape)
    quantize(folder, tmp_path / "quantised", quantization)
    tensors = load_file(tmp_path / "quantised" / "model.safetensors")
    for name in [n for n in tensors if n.endswith("_scale")]:
        weight = name.removesuffix("_scale")
        k = 128 if "ff_out.weight" in weight and "blocks" in weight else 64
        values = quantized.dequantized(tensors[weight].numpy(), tensors.pop(name).float().numpy(), k)
        tensors[weight] = torch.from_numpy(values).float()
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "config.json").write_text((folder / "config.json").read_text())
    save_file(tensors, plain / "model.safetensors")
    twin = Pair(module, plain)
    at_load = module.Engine(str(folder), "float32", quantization, None, "cuda")
    stored = module.Engine(str(tmp_path / "quantised"), "float32", None, None, "cuda")
    for cache in ("none", "dual", "dllm", "d2"):
        settings = SHORT | {"threshold": 0.5, "cache": cache}
        expected = [facts(r) for r in twin.generate(PROMPTS, **settings)[0]]
        for engine in (at_load, stored):
            assert [facts(r) for r in engine.generate(PROMPTS, False, *_native(settings), 8)] == expected, cache


def test_stopping_from_a_callback(pair_of):
    pair = pair_of("llada")
    fields = _native(SHORT | {"num_transfer_tokens": 1, "cache": "dual"})
    with pytest.raises(Interrupted, match="on_step"):
        pair.cuda.generate(PROMPTS, False, *fields, 8, lambda event: event.step < 3)
    agree(pair.generate(PROMPTS, **SHORT))  # the engine can be used again


@pytest.mark.parametrize(
    ("cache", "decoder"),
    [
        *((cache, "threshold") for cache in CACHES),
        *(("dual", decoder) for decoder in ("margin", "entropy", "random", "origin", "eos", "prior")),
    ],
)
def test_events_are_those_of_the_cpu(pair_of, cache, decoder):
    """Everything that on_step is told, in a ragged batch; confidences but for the order of sums in fp32."""
    pair = pair_of("dream")
    fields = _native(SHORT | DECODERS[decoder] | {"cache": CACHES[cache]})
    logs, confidences = [], []
    for engine in (pair.cpu, pair.cuda):
        events = []
        engine.generate(PROMPTS, False, *fields, 2, events.append)
        events.sort(key=lambda e: (e.sequence, e.step))
        logs.append(
            [(e.sequence, e.step, e.block, e.positions, e.token_ids, e.rows, e.computed, e.is_full) for e in events]
        )
        confidences.append([c for e in events for c in e.confidences])
        assert all(e.rows == len(e.computed) and len(e.positions) == len(e.confidences) for e in events)
    assert logs[0] == logs[1]
    assert confidences[0] == pytest.approx(confidences[1], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("cache", ["dual", "d2", "dllm"])
@pytest.mark.parametrize("settings", [{"threshold": 0.5}, {"threshold": 0.5, "cfg_scale": 1.0}], ids=["device", "host"])
def test_logits_that_are_not_finite(tmp_path, cache, settings):
    """Weights that overflow: the layer is named, as on the CPU."""
    folder = models.write_model(tmp_path / "model", "llada")
    weights = load_file(folder / "model.safetensors")
    name = next(n for n in weights if "blocks.1." in n and "ff_out" in n)
    weights[name] *= 1e38
    save_file(weights, folder / "model.safetensors")
    pair = Pair(module, folder)
    fields = _native(SHORT | settings | {"cache": cache})
    for engine in (pair.cpu, pair.cuda):
        with pytest.raises(NumericalError, match=r"not finite at step 0: layer 1 of 3"):
            engine.generate(PROMPTS, False, *fields, 8)
        # What is reserved for the longer prompt, and was never written, is nobody's output.
        with pytest.raises(NumericalError, match=r"not finite at step \d+: layer 1 of 3"):
            engine.generate([PROMPTS[0], [3] * 60], False, *fields, 1)


# --- What a step costs ---

BUDGETS = {"none": 10, "prefix": 10, "dual": 10, "d2": 12, "dllm": 18}


def _traced(engine, prompt, fields):
    """What the second of two calls ran, and its result: the first still runs the copies of loading, and launches where
    the second replays."""
    engine.generate([prompt], False, *fields, 1)
    module.emulator.reset_counters()
    module.emulator.trace(True)
    [result] = engine.generate([prompt], False, *fields, 1)
    return [name for name, _ in module.emulator.executed()], result


@pytest.mark.parametrize(
    ("dtype", "quantization"),
    [("float32", None), ("bfloat16", None), ("bfloat16", "int8")],
    ids=["fp32", "bf16", "int8"],
)
@pytest.mark.parametrize("cache", BUDGETS)
def test_launches_per_layer(tmp_path, cache, dtype, quantization):
    """By the difference between models of 2 and of 4 layers, at the second step. There are enough keys to be split."""
    policy = DLLMCache(kp=50, kr=7, rou=0.25) if cache == "dllm" else cache
    fields = _native(
        {"gen_length": 4, "block_length": 4, "num_transfer_tokens": 1, "cache": policy, "stop_at_eos": False}
    )
    steps = {}
    for n_layers in (2, 4):
        shape = dict(n_layers=n_layers, d_model=128, n_heads=2, n_kv_heads=2, mlp_hidden_size=64)
        shape |= dict(vocab_size=304, embedding_size=304)
        folder = models.write_model(tmp_path / f"{n_layers}", "llada", **shape)
        engine = module.Engine(str(folder), dtype, quantization, None, "cuda")
        names, result = _traced(engine, [i % 200 for i in range(300)], fields)
        begins = [i for i, name in enumerate(names) if name == "plan"]
        assert len(begins) <= result.nfe + 1
        steps[n_layers] = collections.Counter(names[begins[1] : begins[2]])
    per_layer = {name: (count - steps[2][name]) / 2 for name, count in steps[4].items()}
    # dLLM-Cache's layer 0 is always refreshed, and so verifies nothing.
    beside = {name: count - 2 * per_layer[name] for name, count in steps[2].items() if count > 2 * per_layer[name]}
    print(f"\n{cache} {dtype} {quantization}: {sum(per_layer.values()):g} launches per layer:", end="")
    print(
        "",
        *(f"{n:g} {name}," for name, n in per_layer.items() if n),
        "beside:",
        *(f"{n:g} {m}," for m, n in beside.items()),
    )
    assert sum(per_layer.values()) <= BUDGETS[cache]


@pytest.mark.parametrize("cache", BUDGETS)
def test_no_synchronisation_inside_a_block(tmp_path, cache):
    """As many synchronisations for 24 steps as for 6; the host waits once per step, for the one before."""
    folder = models.write_model(tmp_path / "model", "llada", d_model=32, n_heads=2, n_kv_heads=2, mlp_hidden_size=32)
    counts = {}
    for steps in (6, 24):
        engine = module.Engine(str(folder), "float32", None, None, "cuda")
        fields = _native(
            {"gen_length": steps, "block_length": steps, "num_transfer_tokens": 1, "cache": cache, "stop_at_eos": False}
        )
        names, result = _traced(engine, list(range(8)), fields)
        counts[steps] = counters = module.emulator.counters()
        submitted = names.count("plan")
        assert counters["graph_launches"] == counters["waits"] == submitted
        assert counters["copy out"] == 2 * submitted  # the records, and what was committed
        print(f"\n{cache}: {result.nfe} steps: {counters}")
    assert counts[6]["synchronisations"] == counts[24]["synchronisations"] <= 2
    assert counts[6]["copy in"] == counts[24]["copy in"]


@pytest.mark.parametrize("cache", ["prefix", "dual"])
@pytest.mark.parametrize("threshold", [0.2, 0.5, 0.9])
def test_at_most_one_step_in_vain_per_block(tmp_path, cache, threshold):
    folder = models.write_model(tmp_path / "model", "llada")
    engine = module.Engine(str(folder), "float32", None, None, "cuda")
    fields = _native(
        {"gen_length": 24, "block_length": 6, "threshold": threshold, "cache": cache, "stop_at_eos": False}
    )
    names, result = _traced(engine, [1, 2, 3], fields)
    steps = names.count("plan")
    assert result.nfe <= steps <= result.nfe + 4
    assert np.all(np.array(result.stats["rows"]) > 0)


def test_d2_overflow(tmp_path):
    """d2Cache asks for more rows than were launched: the step commits nothing and runs again in a larger one."""
    folder = models.write_model(tmp_path / "model", "dream")
    pair = Pair(module, folder)
    module.emulator.trace(True)
    cache = D2Cache(current_k=1, rollout_p=0.7)
    settings = {"gen_length": 12, "block_length": 6, "num_transfer_tokens": 1, "cache": cache, "stop_at_eos": False}
    [cpu], [cuda] = pair.generate([list(range(3, 90))], **settings)
    assert facts(cuda) == facts(cpu)
    in_vain = [name for name, _ in module.emulator.executed()].count("plan") - cuda.nfe
    assert cuda.stats["rows"][1] > 16  # room for two positions was launched, rounded up to 16
    assert 0 < in_vain <= 4

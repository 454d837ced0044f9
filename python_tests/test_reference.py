"""Tests of the oracle itself (python_tests/reference): against published values, published loops, other code, and
identities that exact caches obey. Nothing here touches the package."""

import math
from dataclasses import replace
from functools import lru_cache

import models
import numpy as np
import pytest
import torch
from reference import loops, philox, published
from reference.loops import Options
from reference.model import ReferenceModel, attention, rms_norm, rope, rotate_half
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm, apply_rotary_pos_emb

FAMILIES = models.FAMILIES


pytestmark = pytest.mark.usefixtures("one_thread")


@lru_cache
def oracle(family, dtype=torch.float64, seed=0, **changes):
    config = models.config_of(family, **changes)
    return ReferenceModel(config, models.random_tensors(config, seed), dtype)


def prompt_of(model, length, seed=0):
    ids = np.random.default_rng(seed).permutation(model.vocab_size)
    return [int(i) for i in ids if i not in (model.shape.mask_id, model.shape.eos_id)][:length]


# ---------------------------------------------------------------------------------------------------- noise


@pytest.mark.parametrize(
    "counter, key, expected",
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter, key, expected):
    """The vectors of Random123's tests/kat_vectors."""
    assert tuple(int(word) for word in philox.philox4x32(counter, key)) == expected


def test_uniform_layout():
    """Key and counter words are where the text puts them, and 52 bits come from the first two output words."""
    seed, stream, step, position, token = 0x0123456789ABCDEF, 1, 5, 77, 299
    w0, w1, _, _ = philox.philox4x32((token, position, step, stream), (0x89ABCDEF, 0x01234567))
    expected = ((int(w0) >> 6) * 2**26 + (int(w1) >> 6) + 0.5) / 2**52
    assert float(philox.uniform(seed, stream, step, position, token)) == expected
    noise = philox.token_gumbel(seed, step, [3, position], 300)
    token_u = float(philox.uniform(seed, philox.TOKEN_STREAM, step, position, token))
    assert noise.shape == (2, 300) and noise[1, token] == pytest.approx(-math.log(-math.log(token_u)), abs=1e-14)
    assert philox.selection_uniform(seed, step, [3, position])[1] == philox.uniform(seed, 1, step, position, 0)


def test_noise_distribution():
    u = philox.uniform(7, 0, 3, np.arange(200)[:, None], np.arange(500)[None, :])
    assert u.dtype == np.float64 and 0 < u.min() < 1e-4 and 1 - 1e-4 < u.max() < 1
    assert len(np.unique(u)) == u.size
    assert abs(u.mean() - 0.5) < 4 / math.sqrt(12 * u.size)
    g = philox.gumbel(u)
    assert abs(g.mean() - 0.5772156649) < 4 * math.pi / math.sqrt(6 * u.size)
    assert abs(g.var() - math.pi**2 / 6) < 0.05


# ---------------------------------------------------------------------------------------------------- model


def transformers_twin(family, config, tensors):
    """transformers' own Llama or Qwen2 with the same weights (fp32, eager attention)."""
    if family == "llada":
        twin = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=config["vocab_size"], hidden_size=config["d_model"], rms_norm_eps=config["rms_norm_eps"],
                intermediate_size=config["mlp_hidden_size"], num_hidden_layers=config["n_layers"],
                num_attention_heads=config["n_heads"], num_key_value_heads=config["n_kv_heads"],
                rope_parameters={"rope_type": "default", "rope_theta": config["rope_theta"]},
                tie_word_embeddings=config["weight_tying"], attn_implementation="eager",
            )
        )  # fmt: skip
        renames = [("model.transformer.wte", "model.embed_tokens"), ("model.transformer.ln_f", "model.norm"),
                   ("model.transformer.ff_out", "lm_head"), ("model.transformer.blocks", "model.layers"),
                   ("attn_norm", "input_layernorm"), ("ff_norm", "post_attention_layernorm"),
                   ("attn_out", "self_attn.o_proj"), ("ff_proj", "mlp.gate_proj"), ("up_proj", "mlp.up_proj"),
                   ("ff_out", "mlp.down_proj")] + [(f"{x}_proj", f"self_attn.{x}_proj") for x in "qkv"]  # fmt: skip
    else:
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                 "num_key_value_heads", "rms_norm_eps", "tie_word_embeddings")  # fmt: skip
        twin = Qwen2ForCausalLM(
            Qwen2Config(
                **{key: config[key] for key in sizes},
                rope_parameters={"rope_type": "default", "rope_theta": config["rope_theta"]},
                attn_implementation="eager",
            )
        )
        renames = []
    state = {}
    for name, tensor in tensors.items():
        for old, new in renames:
            name = name.replace(old, new)
        state[name] = tensor
    missing, unexpected = twin.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    if missing:
        twin.tie_weights()
    return twin.eval()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_model_equals_transformers(family, tied):
    """Llama and Qwen2 of transformers under an all-visible mask; fp32, logits of size 10 (observed error 0)."""
    key = "weight_tying" if family == "llada" else "tie_word_embeddings"
    changes = {key: tied} | ({"n_kv_heads": 2} if family == "llada" and tied else {})
    config = models.config_of(family, **changes)
    tensors = models.random_tensors(config)
    model = ReferenceModel(config, tensors, torch.float32)
    tokens = torch.tensor(prompt_of(model, 29))
    everything = torch.zeros(1, 1, 29, 29)
    twin = transformers_twin(family, config, tensors)
    with torch.no_grad():
        expected = twin(tokens[None], attention_mask=everything).logits[0]
        causal = twin(tokens[None]).logits[0]
    torch.testing.assert_close(model.full_logits(tokens), expected, atol=2e-5, rtol=0)
    assert (causal - expected).abs().max() > 1  # the mask matters


def test_bf16_operations_equal_transformers():
    """RMSNorm and Dream's RoPE, bit for bit in bf16; LLaDA's RoPE rotates in fp32 and rounds once."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(11, 4, 16, generator=generator).bfloat16()
    positions = torch.arange(11) * 37
    angle = positions[:, None] * (1.0 / 1e6 ** (torch.arange(0, 16, 2) / 16))
    angle = torch.cat((angle, angle), -1)
    theirs, _ = apply_rotary_pos_emb(
        x.transpose(0, 1)[None], x.transpose(0, 1)[None], angle.cos()[None].bfloat16(), angle.sin()[None].bfloat16()
    )
    assert torch.equal(rope(x, positions, 1e6, full_precision=False), theirs[0].transpose(0, 1))
    wide = x.float() * angle.cos()[:, None] + rotate_half(x.float()) * angle.sin()[:, None]
    assert torch.equal(rope(x, positions, 1e6, full_precision=True), wide.bfloat16())
    assert not torch.equal(wide.bfloat16(), theirs[0].transpose(0, 1))

    norm = Qwen2RMSNorm(64, eps=1e-6).bfloat16()
    norm.weight.data = torch.rand(64, generator=generator).bfloat16()
    rows = x.reshape(11, 64)
    assert torch.equal(rms_norm(rows, norm.weight.data, 1e-6), norm(rows))


def test_attention_equals_sdpa():
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(5, 6, 8, generator=generator, dtype=torch.float64)
    k, v = torch.randn(2, 9, 3, 8, generator=generator, dtype=torch.float64)
    expected = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), enable_gqa=True
    )
    probabilities = []
    torch.testing.assert_close(attention(q, k, v, probabilities), expected.transpose(0, 1), atol=1e-13, rtol=0)
    torch.testing.assert_close(probabilities[0].sum(-1), torch.ones(6, 5, dtype=torch.float64))


@pytest.mark.parametrize("family", FAMILIES)
def test_partial_forward(family):
    """caching.md 8.1 no. 5 on the oracle, against a dense formula over all T rows that substitutes the cached K, V."""
    model = oracle(family)
    s = model.shape
    tokens = torch.tensor(prompt_of(model, 20) + [s.mask_id] * 5)
    everything = torch.arange(25)
    cache = model.new_cache(25)
    full = model.forward(tokens, everything, cache)

    rows = torch.tensor([3, 21, 4, 24, 0])
    again = cache.clone()
    partial = model.forward(tokens[rows], rows, again)  # same tokens: the same numbers, whatever the order of the rows
    torch.testing.assert_close(partial, full[rows], atol=1e-12, rtol=0)
    torch.testing.assert_close(again.k, cache.k, atol=1e-12, rtol=0)

    changed = tokens.clone()
    changed[rows] = torch.tensor(prompt_of(model, 5, seed=9))
    mixed = cache.clone()
    partial = model.forward(changed[rows], rows, mixed)
    others = torch.tensor([i for i in range(25) if i not in rows])
    assert torch.equal(mixed.k[:, others], cache.k[:, others]) and torch.equal(mixed.v[:, others], cache.v[:, others])
    assert not torch.isclose(mixed.k[:, rows], cache.k[:, rows]).any(-1).all()

    x = model.embed[changed]
    for i, w in enumerate(model.layers):
        n = rms_norm(x, w["attn_norm"], s.eps)
        bias = {part: 0 if w[part + "_bias"] is None else w[part + "_bias"] for part in "qkv"}
        q, k, v = ((n @ w[part].T + bias[part]).unflatten(-1, (-1, s.head_dim)) for part in "qkv")
        q, k = (rope(y, everything, s.theta, s.rope_full_precision) for y in (q, k))
        k[others], v[others] = cache.k[i, others], cache.v[i, others]
        torch.testing.assert_close(mixed.k[i], k, atol=1e-11, rtol=0)
        x = x + attention(q, k, v).flatten(1) @ w["o"].T
        n = rms_norm(x, w["mlp_norm"], s.eps)
        x = x + (torch.nn.functional.silu(n @ w["gate"].T) * (n @ w["up"].T)) @ w["down"].T
    torch.testing.assert_close(partial, rms_norm(x, model.final_norm, s.eps)[rows], atol=1e-11, rtol=0)
    assert (partial - model.forward(changed, everything, cache)[rows]).abs().max() > 1e-2  # stale is not exact


def test_unwritten_slots_show():
    model = oracle("llada")
    assert model.forward(torch.tensor([1, 2]), torch.tensor([0, 1]), model.new_cache(3)).isnan().all()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("family", FAMILIES)
def test_random_models_are_lively(family, seed, tmp_path):
    """What python_tests/models.py promises; and a sharded folder holds the same model."""
    model = ReferenceModel.from_folder(models.write_model(tmp_path / "one", family, seed=seed), torch.float64)
    tokens = torch.tensor(prompt_of(model, 9) + [model.shape.mask_id] * 24)
    probabilities = []
    hidden = model.forward(tokens, torch.arange(33), model.new_cache(33), probabilities)
    logits = model.logits(hidden)
    assert logits.std(-1).min() >= 3
    entropy = -torch.stack([torch.special.xlogy(p, p).sum(-1) for p in probabilities]).mean((1, 2))
    assert (entropy > 0.2 * math.log(33)).all() and (entropy < 0.7 * math.log(33)).all()
    assert logits[9:].std(0).mean() > 1  # masked rows, which hold the same token, differ
    other = tokens.clone()
    other[0] = (tokens[0] + 1) % 200
    assert (model.full_logits(other) - logits)[9:].std() > 0.5  # the prompt matters to the answer
    sharded = models.write_model(tmp_path / "three", family, seed=seed, shards=3)
    assert len(list(sharded.glob("*.safetensors"))) == 3
    assert torch.equal(ReferenceModel.from_folder(sharded, torch.float64).full_logits(tokens), logits)


# ---------------------------------------------------------------------------------------------------- loops


def uniforms(seed, length, vocab):
    def token_uniform(step):
        return torch.from_numpy(philox.uniform(seed, 0, step, np.arange(length)[:, None], np.arange(vocab)[None, :]))

    def select_uniform(step):
        return torch.from_numpy(philox.selection_uniform(seed, step, range(length)))

    return {"token_uniform": token_uniform, "select_uniform": select_uniform}


def positions_by_step(run):
    return [[i for i, _ in step.committed] for step in run.steps]


@pytest.mark.parametrize("steps", [24, 12, 9, 3])
@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 0.8}, {"remasking": "random"}, {"cfg_scale": 1.5}, {"cfg_scale": 0.5, "temperature": 0.5}],
    ids=str,
)
def test_llada_published_loop(options, steps):
    model = oracle("llada")
    prompt = prompt_of(model, 7)
    common = {"gen_length": 24, "block_length": 8, "steps": steps} | options
    run = loops.generate(model, prompt, Options(cache="none", stop_at_eos=False, seed=3, **common))
    noise = uniforms(3, 31, model.vocab_size)
    expected, committed = published.llada(model.full_logits, prompt, model.shape.mask_id, **common, **noise)
    assert run.token_ids == expected[7:].tolist()
    assert positions_by_step(run) == committed
    assert run.nfe == steps * (2 if "cfg_scale" in options else 1)


@pytest.mark.parametrize("steps", [24, 16, 5])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"alg": "entropy", "temperature": 0.3, "top_p": 0.95},
        {"alg": "entropy", "top_k": 5},
        {"alg": "topk_margin", "temperature": 1.2, "top_p": 0.8, "top_k": 20},
        {"alg": "origin", "temperature": 0.7},
        {"alg": "origin", "top_p": 0.5},
    ],
    ids=str,
)
def test_dream_published_loop(options, steps):
    model = oracle("dream")
    prompt = prompt_of(model, 7)
    alg = options.get("alg", "maskgit_plus")
    own = {key: value for key, value in options.items() if key != "alg"}
    own["remasking"] = "low_confidence" if alg == "maskgit_plus" else alg
    run = loops.generate(
        model, prompt,
        Options(gen_length=24, block_length=24, steps=steps, schedule="dream", cache="none", stop_at_eos=False, seed=5,
                **own),
    )  # fmt: skip
    expected, committed = published.dream(
        model.full_logits, prompt, model.shape.mask_id, gen_length=24, steps=steps, **options,
        **uniforms(5, 31, model.vocab_size),
    )  # fmt: skip
    assert run.token_ids == expected[7:].tolist()
    trimmed = committed[: len(run.steps)]  # the published loop goes on when nothing is masked any more
    assert positions_by_step(run) == trimmed and not any(committed[len(trimmed) :])


def test_prefix_cache_on_transformers():
    """Fast-dLLM's prefix cache as published, on transformers' Llama and its growing cache: the K, V left of the block
    are kept, and everything from the block on is recomputed and appended to them."""
    model = oracle("llada")
    config = models.config_of("llada")
    twin = transformers_twin("llada", config, models.random_tensors(config))
    prompt = prompt_of(model, 10)
    run = loops.generate(model, prompt, Options(gen_length=18, block_length=6, threshold=0.6, stop_at_eos=False))
    assert run.margin > 1e-4  # fp32 against fp64 below
    x = torch.tensor(prompt + [model.shape.mask_id] * 18)
    nfe = 0
    for s in range(10, 28, 6):
        cache = DynamicCache()
        begin = 0
        while (x[s : s + 6] == model.shape.mask_id).any():
            with torch.no_grad():
                logits = twin(
                    x[None, begin:], position_ids=torch.arange(begin, 28)[None], past_key_values=cache, use_cache=True,
                    attention_mask=torch.zeros(1, 1, 28 - begin, 28),
                ).logits[0, s - begin : s - begin + 6]  # fmt: skip
            cache.crop(s - 28)
            begin = s
            nfe += 1
            confidence, x0 = logits.double().softmax(-1).max(-1)
            confidence[x[s : s + 6] != model.shape.mask_id] = -1
            take = confidence >= 0.6
            take[confidence.argmax()] = True
            x[s : s + 6][take] = x0[take]
    assert run.token_ids == x[10:].tolist() and run.nfe == nfe > 6


@pytest.mark.parametrize("cache", ["prefix", "dual"])
@pytest.mark.parametrize("family", FAMILIES)
def test_exact_when_blocks_take_one_step(family, cache):
    """caching.md 8.1 no. 2: S = 1, or threshold 0, makes the caches exact; otherwise they are approximations."""
    model = oracle(family)
    prompt = prompt_of(model, 6)

    def ids(**o):
        return loops.generate(model, prompt, Options(gen_length=18, **{"stop_at_eos": False} | o)).token_ids

    for o in ({"block_length": 1, "steps": 18}, {"block_length": 1}, {"block_length": 5, "threshold": 0.0}):
        assert ids(cache=cache, **o) == ids(cache="none", **o)
    o = {"block_length": 6, "steps": 18}
    assert ids(cache=cache, **o) != ids(cache="none", **o)


@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_exact_with_nothing_outside_the_block(cache):
    """caching.md 8.1 no. 4: LLaDA, empty prompt, one block."""
    model = oracle("llada")
    o = Options(gen_length=12, block_length=12, steps=12, remasking="random", temperature=1.0, stop_at_eos=False)
    runs = [loops.generate(model, [], replace(o, cache=c)) for c in (cache, "none")]
    assert runs[0] == runs[1] and len(set(runs[0].token_ids)) > 3


def test_rows_of_caches():
    """Positions computed after a block's first step, by hand: P = 4 with a masked prompt position 2, S = 3, T = 10."""
    blocks = loops.block_positions(4, 6, 3, [2])
    assert blocks == [[2, 4, 5, 6], [7, 8, 9]] and loops.block_positions(4, 7, 3, [])[-1] == [10]

    def rows(cache, shift, block):
        return loops.rows_of_step(cache, shift, blocks[block], 4 + 3 * block, 10, first=False)

    assert rows("none", 0, 0) == list(range(10))
    assert rows("prefix", 0, 0) == [2, 4, 5, 6, 7, 8, 9] and rows("prefix", 0, 1) == [7, 8, 9]
    assert rows("dual", 0, 0) == [2, 4, 5, 6] and rows("dual", 0, 1) == [7, 8, 9]
    assert rows("prefix", 1, 0) == [1, 2, 3, 4, 5, 6, 7, 8, 9] and rows("prefix", 1, 1) == [6, 7, 8, 9]
    assert rows("dual", 1, 0) == [1, 3, 4, 5] and rows("dual", 1, 1) == [6, 7, 8]
    assert all(loops.rows_of_step(c, 1, blocks[0], 4, 10, first=True) == list(range(10)) for c in ("prefix", "dual"))

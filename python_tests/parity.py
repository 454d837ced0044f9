"""Shared by the tests that compare the engine with the oracle: pairs of the two, and the settings they are run with."""

import tempfile
from dataclasses import dataclass, fields, replace
from functools import lru_cache

import models
import torch
from reference import loops
from reference.loops import Options
from reference.model import ReferenceModel

from dllm_ext import D2Cache, DLLMCache, Engine, TokenFrequencies

FAMILIES = models.FAMILIES
CACHES = ("none", "prefix", "dual")
ALL_CACHES = (*CACHES, "dllm", "d2")
# Small enough that on the canvases below every refresh, selection and gap filling happens.
CACHE_SETTINGS = {"dllm": {"kp": 8, "kr": 3}, "d2": {"current_k": 6, "rollout_p": 0.2}}
FEATURE_FIELDS = ("kp", "kr", "rou", "always_refresh_layers", "cfg_interval_steps")
ROLLOUT_FIELDS = {"rollout_p": "rollout_p", "current_k": "current_k", "d2_sigma": "sigma", "inflate_w": "inflate_w"}

# (prompt length, gen_length, block_length): whole blocks, a ragged last block, blocks of one, one block for everything
SHAPES = [(9, 24, 8), (5, 19, 7), (1, 6, 1), (12, 11, 16)]

# Settings of a generation; "per_block" steps per block stand for `steps`.
DECODERS = {
    "default": {},
    "threshold": {"threshold": 0.4},
    "threshold 0": {"threshold": 0.0},
    "threshold 1": {"threshold": 1.0},
    "threshold margin": {"threshold": 0.25, "remasking": "topk_margin"},
    "threshold, at least 3": {"threshold": 0.7, "num_transfer_tokens": 3},
    "factor": {"factor": 1.1},
    "factor margin": {"factor": 2.0, "remasking": "topk_margin"},
    "factor, at least 2": {"factor": 0.5, "num_transfer_tokens": 2},
    "2 per step": {"num_transfer_tokens": 2},
    "2 per step, entropy": {"num_transfer_tokens": 2, "remasking": "entropy"},
    "steps 1": {"per_block": 1},
    "steps 3": {"per_block": 3},
    "steps 30": {"per_block": 30},
    "steps margin": {"per_block": 5, "remasking": "topk_margin"},
    "steps entropy": {"per_block": 5, "remasking": "entropy"},
    "steps random": {"per_block": 5, "remasking": "random", "seed": 3},
    "steps, at least 3": {"per_block": 6, "num_transfer_tokens": 3},
    "temperature": {"per_block": 6, "temperature": 0.8, "seed": 1},
    "temperature, threshold": {"threshold": 0.5, "temperature": 1.3, "seed": 2**40 + 7},
    "temperature, filters": {"per_block": 4, "temperature": 0.9, "top_p": 0.8, "top_k": 12, "seed": 5},
    "temperature, entropy": {"per_block": 4, "temperature": 1.0, "remasking": "entropy", "top_k": 7},
    "top_p": {"threshold": 0.6, "top_p": 0.7},
    "top_k 1": {"per_block": 4, "top_k": 1},
    "dream steps": {"schedule": "dream", "per_block": 5},
    "dream entropy": {"schedule": "dream", "per_block": 6, "remasking": "entropy", "temperature": 0.3, "top_p": 0.95},
    "dream margin": {"schedule": "dream", "per_block": 4, "remasking": "topk_margin", "temperature": 1.2, "top_k": 9},
    "dream random": {"schedule": "dream", "per_block": 4, "remasking": "random", "temperature": 0.5},
    "dream origin": {"schedule": "dream", "per_block": 4, "remasking": "origin"},
    "dream origin, temperature": {"schedule": "dream", "per_block": 7, "remasking": "origin", "temperature": 0.9},
    "dream alg_temp": {"schedule": "dream", "per_block": 5, "alg_temp": 0.3, "seed": 8},
    "dream alg_temp, entropy": {"schedule": "dream", "per_block": 5, "alg_temp": 1.5, "remasking": "entropy"},
    "dream eps": {"schedule": "dream", "per_block": 8, "eps": 0.2, "num_transfer_tokens": 1},
    "dream threshold": {"schedule": "dream", "threshold": 0.6, "temperature": 0.7, "top_p": 0.9},
    "llada alg_temp": {"per_block": 4, "alg_temp": 0.2},
    "guidance": {"per_block": 5, "cfg_scale": 1.5},
    "guidance, all of it": {
        "threshold": 0.5,
        "cfg_scale": 0.5,
        "temperature": 0.6,
        "top_p": 0.9,
        "logits_eos_inf": True,
    },
    "eos never": {"per_block": 5, "logits_eos_inf": True},
    "eos late": {"per_block": 5, "confidence_eos_eot_inf": True},
    "eos late, margin": {
        "threshold": 0.5,
        "confidence_eos_eot_inf": True,
        "remasking": "topk_margin",
        "temperature": 0.4,
    },
    "no stop": {"per_block": 5, "stop_at_eos": False},
    "prior": {"num_transfer_tokens": 1, "sigma": 10.0},
    "prior off": {"num_transfer_tokens": 2, "sigma": 0.0},
    "prior, threshold": {"threshold": 0.4, "sigma": 5.0},
    "prior, factor": {"factor": 1.5, "sigma": 6.0, "num_transfer_tokens": 2},
    "prior, entropy": {"num_transfer_tokens": 2, "sigma": 5.0, "remasking": "entropy"},
    "prior, drawn": {"num_transfer_tokens": 2, "sigma": 8.0, "alg_temp": 0.1, "seed": 2},
    "eb": {"gamma": 2.0},
    "eb, entropy": {"gamma": 1.0, "remasking": "entropy"},
    "eb, prior, at least 2": {"gamma": 0.0, "sigma": 4.0, "num_transfer_tokens": 2},
    "klass": {"kl_threshold": 0.3, "threshold": 0.3},
    "klass, factor": {"kl_threshold": 0.6, "factor": 1.5, "kl_history_length": 1},
    "klass, guidance": {"kl_threshold": 0.8, "threshold": 0.2, "cfg_scale": 0.6, "top_p": 0.9},
    "pc": {"num_transfer_tokens": 1, "token_frequencies": True, "position_decay": 0.25},
    "pc, clipped": {"threshold": 0.4, "token_frequencies": True, "clip_alpha": 1.5},
    "decay": {"per_block": 4, "position_decay": 0.5, "remasking": "topk_margin"},
    "left to right": {"num_transfer_tokens": 2, "autoregressive": True},
    "left to right, threshold": {"threshold": 0.2, "autoregressive": True},
    "left to right, steps": {"per_block": 3, "autoregressive": True},
}


@dataclass
class Pair:
    """The same model twice: fp32 natively, fp64 in the oracle."""

    engine: Engine
    oracle: ReferenceModel

    @classmethod
    def from_folder(cls, folder):
        return cls(Engine.from_pretrained(folder, dtype="float32"), ReferenceModel.from_folder(folder, torch.float64))


@lru_cache
def frequent_stop(family):
    """Config changes that make tokens this model likes its EOS and end of turn, so that generations end anywhere."""
    config = models.config_of(family)
    oracle = ReferenceModel(config, models.random_tensors(config), torch.float64)
    counts = torch.zeros(oracle.vocab_size)
    for length, gen_length, _ in SHAPES:
        o = Options(gen_length=gen_length, block_length=4, num_transfer_tokens=1, stop_at_eos=False)
        for token in loops.generate(oracle, prompt_of(family, length), o).token_ids:
            counts[token] += 1
    return {"eos_token_id": counts.sort(descending=True, stable=True).indices[2:5].tolist()}


@lru_cache
def pair_of(family, stops=False):
    """The small model of a family; with stops=True its stop ids are frequent tokens."""
    with tempfile.TemporaryDirectory() as folder:
        return Pair.from_folder(models.write_model(folder, family, **(frequent_stop(family) if stops else {})))


def prompt_of(family, length, seed=None):
    return models.random_prompt(models.config_of(family), length, seed=length if seed is None else seed)


def frequencies():
    """A made-up corpus: ids in no order, frequencies from 1e-5 to a half."""
    values = [(0.5 ** (1 + i * 7 % 16)) for i in range(320)]
    return tuple(values)


def is_legal(decoder, cache):
    """d2Cache chooses by confidence, which origin does not have, and may not compute the leftmost masked position."""
    settings = DECODERS[decoder]
    return cache != "d2" or not (settings.get("remasking") == "origin" or settings.get("autoregressive"))


def options_of(decoder, shape, cache, **more):
    """Options of a generation from an entry of DECODERS and of SHAPES."""
    settings = CACHE_SETTINGS.get(cache, {}) | DECODERS[decoder] | more
    _, gen_length, block_length = shape
    if settings.get("token_frequencies"):
        settings["token_frequencies"] = frequencies()
    if (per_block := settings.pop("per_block", None)) is not None:
        settings["steps"] = per_block * max(1, -(-gen_length // block_length))
    return Options(gen_length=gen_length, block_length=block_length, cache=cache, **settings)


def engine_settings(o):
    """The arguments of Engine.generate() that stand for the oracle's Options."""
    settings = {f.name: getattr(o, f.name) for f in fields(o)}
    dllm = {name: settings.pop(name) for name in FEATURE_FIELDS}
    d2 = {name: settings.pop(field) for field, name in ROLLOUT_FIELDS.items()}
    if o.cache == "dllm":
        settings["cache"] = DLLMCache(**dllm)
    elif o.cache == "d2":
        settings["cache"] = D2Cache(**d2)
    if o.token_frequencies is not None:
        settings["token_frequencies"] = TokenFrequencies(o.token_frequencies)
    return settings


def run_engine(engine, prompts, o, **more):
    """(results, events by prompt) of the engine for a list of prompts."""
    events = [[] for _ in prompts]
    results = engine.generate(prompts, on_step=lambda e: events[e.sequence].append(e), **engine_settings(o), **more)
    return results, events


class Report:
    """Smallest decision margins of the oracle, by kind, and where they were; printed in the terminal summary."""

    def __init__(self):
        self.smallest = {}
        self.runs = 0
        self.lines = []

    def note(self, run, where):
        self.runs += 1
        for kind, gap in run.margins.items():
            self.smallest[kind] = min((gap, where), self.smallest.get(kind, (float("inf"), "")))

    def pytest_terminal_summary(self, terminalreporter):
        terminalreporter.section("engine against oracle")
        terminalreporter.line(f"{self.runs} generations; smallest gap to another decision (oracle, fp64):")
        for kind, (gap, where) in sorted(self.smallest.items(), key=lambda item: item[1]):
            terminalreporter.line(f"  {kind:<10} {gap:.3e}  {where}")
        for line in self.lines:
            terminalreporter.line(line)


def check(pair, prompt, o, report, where):
    """One generation: tokens, every step's commits, and every counter are the oracle's. Returns the oracle's run."""
    if o.token_frequencies is not None:
        o = replace(o, token_frequencies=o.token_frequencies[: pair.oracle.vocab_size])
    (result,), (events,) = run_engine(pair.engine, [prompt], o)
    run = loops.generate(pair.oracle, prompt, o)
    report.note(run, where)
    committed = [list(zip(e.positions, e.token_ids, strict=True)) for e in events]
    assert committed == [step.committed for step in run.steps], where
    assert result.token_ids == run.token_ids, where
    assert result.prompt_ids == run.prompt_ids, where
    assert result.nfe == run.nfe, where

    assert result.stats.commits == [len(step.committed) for step in run.steps], where
    if o.cache == "dllm":
        return run  # its rows are chosen per layer, and the oracle computes more of them than the engine
    streams = 2 if o.cfg_scale > 0 else 1
    length = len(prompt) + o.gen_length
    layers = pair.oracle.shape.n_layers
    assert [e.rows for e in events] == [len(step.rows) for step in run.steps], where
    assert result.stats.rows == [streams * len(step.rows) for step in run.steps], where
    assert result.stats.layer_rows == [layers * rows for rows in result.stats.rows], where
    assert result.stats.logit_rows == [streams * len(step.logit_rows) for step in run.steps], where
    assert result.stats.attention_pairs == [
        # the last layer needs only the rows that have logits, but rollout wants the attention of all
        streams * length * (len(step.rows) * (layers - 1) + len(step.rows if o.cache == "d2" else step.logit_rows))
        for step in run.steps
    ], where
    return run

"""Token ids against the released code of d2Cache's harness and of dLLM-Cache.

golden/d2cache_*.json hold what the harness of Kamichanw/d2Cache generated (its loops vanilla, klass and ar with every
one of its caches; here `reference_quirks=True`), golden/dllm_cache_*.json what maomaocun/dLLM-cache did, with the
random models of golden_models.py. Settings are named as in GenerationConfig; a cache is an object with its name and its
own settings. `token_ids` and `nfe` are lists with an entry for each prompt where a case has several.

There are no margins. Instead a case is only there if the released code gave the same in fp64, in fp32, and in fp64
with noise of 1e-6 on the weights (for the harness also on confidences and densities).

A few cases hold, for every step, the computed rows ("rows") and the committed positions ("commits").
"""

import functools
import json
from pathlib import Path

import golden_models
import pytest
from reference.loops import Options, generate_batch
from reference.model import ReferenceModel

from dllm_ext import D2Cache, DLLMCache, Engine, TokenFrequencies

FILES = ("d2cache_dream", "d2cache_llada", "dllm_cache_dream", "dllm_cache_llada")
DATA = [json.loads((Path(__file__).parent / "golden" / f"{name}.json").read_text()) for name in FILES]
CASES = {case["id"]: case for data in DATA for case in data["cases"]}
MODELS = {name: model for data in DATA for name, model in data["models"].items()}
TRACED = [name for name, case in CASES.items() if "rows" in case]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """Model name -> checkpoint folder, written once."""

    def write(name):
        model = MODELS[name]
        named_arrays = golden_models.weights(model["config"], model["seed"])
        return golden_models.write_folder(tmp_path_factory.mktemp(name), model["config"], named_arrays)

    return functools.cache(write)


@pytest.fixture(scope="module")
def engine_of(folder_of):
    """Model name -> fp32 engine, loaded once."""
    return functools.cache(lambda name: Engine.from_pretrained(folder_of(name), device="cpu", dtype="float32"))


@pytest.fixture(scope="module")
def reference_of(folder_of):
    """Model name -> fp32 model of the Python reference, loaded once."""
    return functools.cache(lambda name: ReferenceModel.from_folder(folder_of(name)))


def prompts_of(case):
    return case.get("prompts") or [case["prompt"]]


def expected_of(case):
    """(token ids, nfe) of each prompt."""
    batch = "prompts" in case
    return list(zip(case["token_ids"], case["nfe"], strict=True)) if batch else [(case["token_ids"], case["nfe"])]


def vocab_size_of(case):
    return MODELS[case["model"]]["config"]["vocab_size"]


def engine_settings(case):
    """The keywords of Engine.generate."""
    settings = dict(case["settings"])
    own = dict(settings.pop("cache"))
    name = own.pop("name")
    settings["cache"] = {"dllm": DLLMCache, "d2": D2Cache}[name](**own) if own else name
    if "token_frequencies" in settings:
        table = settings["token_frequencies"]
        counts = {int(token): count for token, count in table["counts"].items()}
        settings["token_frequencies"] = TokenFrequencies.from_counts(counts, table["num_token"], vocab_size_of(case))
    return settings


def reference_options(case):
    """The Options of the reference."""
    settings = dict(case["settings"])
    settings.pop("batch_size", None)
    own = dict(settings.pop("cache"))
    settings["cache"] = own.pop("name")
    settings |= {"d2_sigma" if name == "sigma" else name: value for name, value in own.items()}
    if "token_frequencies" in settings:
        table = settings["token_frequencies"]
        frequencies = [1 / table["num_token"]] * vocab_size_of(case)
        for token, count in table["counts"].items():
            frequencies[int(token)] = count / table["num_token"]
        settings["token_frequencies"] = frequencies
    return Options(**settings)


@pytest.mark.parametrize("name", MODELS)
def test_weights_are_those_of_the_recording(name):
    model = MODELS[name]
    assert model["recipe"] == golden_models.RECIPE
    assert golden_models.digest(golden_models.weights(model["config"], model["seed"])) == model["digest"]


def test_files_agree():
    for data in DATA:
        for name, model in data["models"].items():
            assert model == MODELS[name]
        for case in data["cases"]:
            assert case["original"] in data["originals"]
            assert case["settings"]["reference_quirks"] == (case["original"] == "d2cache")
            assert len(prompts_of(case)) == case["settings"].get("batch_size", 1)
    assert sum(len(data["cases"]) for data in DATA) == len(CASES)


@pytest.mark.parametrize("name", CASES)
def test_engine_gives_the_same_ids(name, engine_of):
    case = CASES[name]
    results = engine_of(case["model"]).generate(prompts_of(case), **engine_settings(case))
    assert [(list(r.token_ids), r.nfe) for r in results] == expected_of(case)


def kind_of(case):
    """What makes a case different from others: program, cache, the names of its settings, one sequence or a batch."""
    settings = case["settings"]
    names = sorted(name for name, value in settings.items() if value not in (None, False))
    return case["original"], settings["cache"]["name"], settings.get("remasking"), *names, "prompts" in case


def one_of_each_kind():
    """The cheapest case of every kind: the reference is slow, and agrees with the engine, which meets every case."""
    cheapest = {}
    for name, case in CASES.items():
        nfe = case["nfe"] if isinstance(case["nfe"], int) else sum(case["nfe"])
        cheapest[kind_of(case)] = min((nfe, name), cheapest.get(kind_of(case), (nfe, name)))
    return sorted(name for _, name in cheapest.values())


@pytest.mark.parametrize("name", one_of_each_kind())
def test_reference_gives_the_same_ids(name, reference_of):
    case = CASES[name]
    runs = generate_batch(reference_of(case["model"]), prompts_of(case), reference_options(case))
    assert [(run.token_ids, run.nfe) for run in runs] == expected_of(case)


@pytest.mark.parametrize("name", TRACED)
def test_reference_computes_the_same_rows(name, reference_of):
    case = CASES[name]
    runs = generate_batch(reference_of(case["model"]), prompts_of(case), reference_options(case))
    for b, run in enumerate(runs):
        # Of a batch: for every step a list for each sequence, empty where it had nothing to do.
        rows = [step[b] for step in case["rows"] if step[b]] if "prompts" in case else case["rows"]
        commits = [step[b] for step in case["commits"] if step[b]] if "prompts" in case else case["commits"]
        assert [step.rows for step in run.steps] == rows
        assert [[i for i, _ in step.committed] for step in run.steps] == commits

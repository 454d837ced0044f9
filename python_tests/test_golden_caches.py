"""Token ids against the released code of d2Cache's harness and of dLLM-Cache.

golden/d2cache_*.json hold what the harness of Kamichanw/d2Cache generated (its loops vanilla, klass and ar with every
one of its caches; here `reference_quirks=True`), golden/dllm_cache_*.json what maomaocun/dLLM-cache did, with the
random models of golden_models.py. Settings are named as in GenerationConfig; a cache is an object with its name and its
own settings. `token_ids` and `nfe` are lists with an entry for each prompt where a case has several.

There are no margins. Instead a case is only there if the released code gave the same in fp64, in fp32, and in fp64
with noise of 1e-6 on the weights (for the harness also on confidences and densities).

A few cases hold, for every step, the computed rows ("rows") and the committed positions ("commits").
"""

import pytest
from golden_files import Recordings
from reference.loops import Options, generate_batch

from dllm_ext import D2Cache, DLLMCache, TokenFrequencies

RECORDED = Recordings("d2cache_dream", "d2cache_llada", "dllm_cache_dream", "dllm_cache_llada")
CASES = RECORDED.cases
TRACED = [name for name, case in CASES.items() if "rows" in case]

pytestmark = pytest.mark.usefixtures("one_thread")


def prompts_of(case):
    return case.get("prompts") or [case["prompt"]]


def expected_of(case):
    """(token ids, nfe) of each prompt."""
    batch = "prompts" in case
    return list(zip(case["token_ids"], case["nfe"], strict=True)) if batch else [(case["token_ids"], case["nfe"])]


def vocab_size_of(case):
    return RECORDED.models[case["model"]]["config"]["vocab_size"]


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


def test_recordings():
    RECORDED.check()
    for data in RECORDED.data:
        for case in data["cases"]:
            assert case["original"] in data["originals"]
            assert case["settings"]["reference_quirks"] == (case["original"] == "d2cache")
            assert len(prompts_of(case)) == case["settings"].get("batch_size", 1)


@pytest.mark.parametrize("name", CASES)
def test_engine_gives_the_same_ids(name):
    case = CASES[name]
    results = RECORDED.engine(case).generate(prompts_of(case), **engine_settings(case))
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
def test_reference_gives_the_same_ids(name):
    case = CASES[name]
    runs = generate_batch(RECORDED.reference(case), prompts_of(case), reference_options(case))
    assert [(run.token_ids, run.nfe) for run in runs] == expected_of(case)


@pytest.mark.parametrize("name", TRACED)
def test_reference_computes_the_same_rows(name):
    case = CASES[name]
    runs = generate_batch(RECORDED.reference(case), prompts_of(case), reference_options(case))
    for b, run in enumerate(runs):
        # Of a batch: for every step a list for each sequence, empty where it had nothing to do.
        rows = [step[b] for step in case["rows"] if step[b]] if "prompts" in case else case["rows"]
        commits = [step[b] for step in case["commits"] if step[b]] if "prompts" in case else case["commits"]
        assert [step.rows for step in run.steps] == rows
        assert [[i for i, _ in step.committed] for step in run.steps] == commits

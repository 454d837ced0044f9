"""The tasks of eval.py and pareto.py: data sets from a local place, and the tasks that the harness lacks.

Prompts, few-shot examples and scores are lm-evaluation-harness's own. Where this file defines a task itself, the reason
stands there.
"""

import importlib
import os
import random
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import datasets
import lm_eval.tasks
from lm_eval.api.group import Group
from lm_eval.api.instance import Instance
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager
from mini_gsm.data import final_answer, held_out

from dllm_ext.errors import ConfigError, DLLMError, InputError
from dllm_ext.harness import stop_strings
from dllm_ext.tokenizer import cut

from . import code_tasks, sandbox
from .settings import table

READERS = {".json": "json", ".jsonl": "json", ".gz": "json", ".parquet": "parquet", ".csv": "csv"}


@dataclass(frozen=True)
class DataSet:
    """Where a data set's problems are."""

    hub: str | None  # Hugging Face id
    config: str | None = None
    split: str = "test"  # the one that is asked
    maker: Callable[[], list[dict]] | None = None  # makes the problems where no path is given


def _mini_gsm():
    return [{"question": p.question, "answer": p.answer} for p in held_out(2000, seed=4242)]


DATA_SETS = {
    "gsm8k": DataSet("openai/gsm8k", "main"),
    "math-500": DataSet("HuggingFaceH4/MATH-500"),
    "humaneval": DataSet(None, maker=code_tasks.human_eval_problems),
    "mbpp": DataSet("google-research-datasets/mbpp", "full"),
    "gpqa": DataSet("Idavidrein/gpqa", "gpqa_main", "train"),
    "mmlu_pro": DataSet("TIGER-Lab/MMLU-Pro"),
    "longbench-hotpotqa": DataSet("Xnhyacinth/LongBench", "hotpotqa"),
    "mini-gsm": DataSet(None, maker=_mini_gsm),
}


# --- Data sets --------------------------------------------------------------------------------------------------------
def read(name: str, path: str | None) -> datasets.DatasetDict:
    """The data set `name` by its splits.

    path: a folder that datasets.load_dataset or load_from_disk reads, such as a copy of the hub's; a file (JSON, JSON
        lines, also .gz, Parquet, CSV), which is then the split that is asked; or None: made here, or from the hub.

    Raises InputError where there is none.
    """
    source = DATA_SETS[name]
    if path is None:
        if source.maker:
            return datasets.DatasetDict({source.split: datasets.Dataset.from_list(source.maker())})
        return _from_hub(name, source)
    place = Path(path).expanduser()
    if not place.exists():
        raise InputError(f"dataset.path={path} does not exist")
    if place.is_file() and place.suffix not in READERS:
        raise InputError(f"dataset.path={path} is no data file; there can be: {', '.join(READERS)}")
    try:
        if place.is_file():
            return datasets.load_dataset(READERS[place.suffix], data_files={source.split: str(place)})
        if (place / "dataset_dict.json").exists():
            return datasets.load_from_disk(str(place))
        named = source.config and (place / "README.md").exists()  # a copy of a hub's folder says what its parts are
        return datasets.load_dataset(str(place), source.config if named else None)
    except (datasets.exceptions.DatasetsError, ValueError, OSError) as e:
        raise InputError(f"dataset.path={path} cannot be read as {name}: {e}") from e


def _from_hub(name, source):
    try:
        return datasets.load_dataset(source.hub, source.config)
    except Exception as e:  # whatever the hub's client raises where there is no connection
        raise InputError(
            f"{name} ({source.hub}) is not in the local cache and cannot be fetched ({type(e).__name__}); "
            "give its folder or file as dataset.path=PATH"
        ) from e


# --- Tasks ------------------------------------------------------------------------------------------------------------
def load(name: str, path: str | None = None, seed: int = 0, execute: bool = False) -> list[Task | Group]:
    """The harness's task objects of a data set, as simple_evaluate takes them.

    path: see `read`. seed: of answers that a task shuffles. execute: whether answers that are programs are run.
    """
    entry = table()["tasks"].get(name)
    if entry is None:
        raise ConfigError(f"dataset.name = {name!r} does not exist; there are: {', '.join(table()['tasks'])}")
    data = read(name, path)
    changes = {"custom_dataset": lambda **_: data}
    folder, _, of_harness = entry["task"].rpartition("/")
    manager = task_manager(folder)
    random.seed(seed)  # gpqa shuffles with it
    datasets.disable_caching()  # else its shuffled problems are those of the first command ever, whatever its seed was
    try:
        if entry["task"] == "own":
            spec = {"task": name} | OWN[name](data, execute) | changes
        else:  # the manager itself has no way to change all tasks of a group
            index = manager.task_index
            spec = manager._factory.build(index[of_harness], overrides=changes, registry=index)
        loaded = manager.load(spec)
        for task in loaded["tasks"].values():
            _process_once(task)
            task.doc_to_text(task.eval_docs[0]), task.doc_to_target(task.eval_docs[0])
    except DLLMError:
        raise
    except ImportError as e:
        raise ConfigError(f"{name} needs packages that are not installed: {e} (pip install 'dllm_ext[eval]')") from e
    except Exception as e:  # whatever the harness's code raises where columns are missing or have other types
        raise InputError(f"the data of {name} has not what the task needs: {e!r}") from e
    return list(loaded["groups"].values()) or list(loaded["tasks"].values())


def task_manager(folder: str = "") -> TaskManager:
    """A manager of one folder of the harness's tasks. To read all ten thousand files takes it several seconds."""
    paths = [Path(lm_eval.tasks.__file__).parent / folder] if folder else None
    return TaskManager(include_path=paths, include_defaults=False)


def _process_once(task):
    """Problems are made from the data once, not every time they are read: a task may draw random numbers for it."""
    if task.config.process_docs is None:
        return
    split = task.config.test_split or task.config.validation_split
    task.dataset = {**task.dataset, split: task.eval_docs}
    task.config.process_docs = None


def _number(doc, results):
    return {"exact_match": float(final_answer(results[0]) == final_answer(doc["answer"]))}


def mini_gsm_task(data, execute):
    """The word problems that the bundled model was trained for (benchmarks/mini_gsm)."""
    return {
        "output_type": "generate_until",
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "process_results": _number,
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        "generation_kwargs": {"until": []},
        "num_fewshot": 0,
    }


def math_500_task(data, execute):
    """As the harness's minerva_math500, which cannot be used beside Hydra: each asks for another antlr.

    Its prompts and normal forms do not need it, so they are used; of its two scores, math_verify is the same, and
    exact_match compares normal forms alone, not what sympy reads in them.
    """
    from math_verify import parse, verify

    with mock.patch("importlib.metadata.version", return_value="4.11"):
        minerva = importlib.import_module("lm_eval.tasks.minerva_math.utils")

    def score(doc, results):
        answer = minerva.normalize_final_answer(minerva.get_unnormalized_answer(results[0]))
        equal = verify(gold=parse(doc["solution"]), target=parse(results[0]))
        return {"exact_match": float(answer == doc["answer"]), "math_verify": float(equal)}

    metrics = ("exact_match", "math_verify")
    return {
        "output_type": "generate_until",
        "test_split": "test",
        "process_docs": minerva.process_docs,
        "doc_to_text": minerva.doc_to_text,
        "doc_to_target": "{{answer if few_shot is undefined else solution}}",
        "process_results": score,
        "metric_list": [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in metrics],
        "generation_kwargs": {"until": ["Problem:"]},
        "num_fewshot": 4,
        "fewshot_config": {"sampler": "first_n", "samples": minerva.list_fewshot_samples},
    }


def code_task(program: Callable[[dict, str], tuple[str, str]], execute: bool, **more) -> dict:
    """A task whose answers become programs, each run in the sandbox. The harness's own such tasks run them unprotected.

    program: of a problem and an answer. execute: False runs nothing, and nothing is scored.
    """

    def run(answers, problems):
        programs = [program(doc, text) for texts, doc in zip(answers, problems, strict=True) for text in texts]
        libraries = [sysconfig.get_path("purelib")]  # numpy, which some answers import
        outcomes = sandbox.run_all(programs, os.cpu_count(), path=libraries) if execute else iter(())
        return [[vars(next(outcomes)) for _ in texts] if execute else texts for texts in answers]

    def score(doc, results):
        if not execute:
            return {}
        [outcomes] = results
        passed = sum(outcome["passed"] for outcome in outcomes)
        return {"pass@1": code_tasks.pass_at_k(len(outcomes), passed, 1)}

    return {
        "output_type": "generate_until",
        "test_split": "test",
        "process_results": score,
        "metric_list": [{"metric": "pass@1", "aggregation": "mean", "higher_is_better": True}],
        "filter_list": [{"name": "none", "filter": [{"function": "custom", "filter_fn": run}]}],
        **more,
    }


def _is_fenced(answer):
    """Whether the code stands in a block that the answer opens itself, as chat models write."""
    return 0 <= answer.find("```python") == answer.find("```")


def human_eval_answer(problem: dict, answer: str) -> tuple[str, str]:
    """The program of an answer: its first ```python block, else what continues the prompt, up to its end."""
    if _is_fenced(answer):
        return code_tasks.human_eval_program(problem, "\n" + code_tasks.first_block(answer))
    completion = cut(code_tasks.before_fence(answer), code_tasks.HUMANEVAL_STOPS)
    return code_tasks.human_eval_program(problem, completion)


def mbpp_answer(problem: dict, answer: str) -> tuple[str, str]:
    """The program of an answer: its first ```python block, else all of it."""
    code = code_tasks.first_block(answer) if _is_fenced(answer) else code_tasks.before_fence(answer)
    return code_tasks.mbpp_program(problem, code)


def humaneval_task(data, execute):
    """HumanEval, as the harness asks it."""
    return code_task(
        human_eval_answer,
        execute,
        doc_to_text="{{prompt}}",
        doc_to_target="{{canonical_solution}}",
        generation_kwargs={"until": []},
        num_fewshot=0,
    )


def mbpp_task(data, execute):
    """MBPP, as the harness asks it: the problems 2, 3 and 4 are shown."""

    def shown():
        if "prompt" not in data:
            raise InputError(f"mbpp's few-shot examples are in its split prompt; there are: {', '.join(data)}")
        return [doc for doc in data["prompt"] if doc["task_id"] in (2, 3, 4)]

    text = "You are an expert Python programmer, and here is your task: {{text}} Your code should pass these tests:"
    return code_task(
        mbpp_answer,
        execute,
        doc_to_text=text + "\n\n{{test_list[0]}}\n{{test_list[1]}}\n{{test_list[2]}}\n[BEGIN]\n",
        doc_to_target="{{code}}\n[DONE]",
        target_delimiter="",
        generation_kwargs={"until": ["[DONE]"]},
        num_fewshot=3,
        fewshot_config={"sampler": "first_n", "samples": shown},
    )


OWN = {"mini-gsm": mini_gsm_task, "math-500": math_500_task, "humaneval": humaneval_task, "mbpp": mbpp_task}


# --- One problem at a time --------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Example:
    """One problem as a model sees it."""

    index: int
    prompt: str
    until: list[str]
    instance: Instance


class Examples:
    """The problems of a task that generates, each scored by itself: for programs that have a loop of their own.

    Attributes:
        examples: The problems.
        metric: The harness's name of the score that is called accuracy.
    """

    def __init__(self, name: str, n: int | None = None, path: str | None = None, seed: int = 0, chat_template=None):
        """n: problems, from the first; None: all. chat_template: as HarnessModel.apply_chat_template, or None."""
        [task] = load(name, path, seed)
        if not isinstance(task, Task):
            raise ConfigError(f"{name} is a group of tasks; there are single ones: {', '.join(DATA_SETS)}")
        self.metric, _, self._filter = table()["tasks"][name]["metric"].partition(",")
        self._task = task
        task.set_fewshot_seed(seed=seed)
        task.build_all_requests(
            limit=n, rank=0, world_size=1, apply_chat_template=chat_template is not None, chat_template=chat_template
        )
        self.examples = [
            Example(i, instance.args[0], stop_strings(instance.args[1]), instance)
            for i, instance in enumerate(task.instances)
        ]

    def score(self, example: Example, text: str) -> dict[str, float]:
        """The scores of an answer, which is cut at stop strings already."""
        example.instance.resps = [text]
        self._task._instances = [example.instance]
        self._task.apply_filters()
        return self._task.process_results(example.instance.doc, [example.instance.filtered_resps[self._filter]])

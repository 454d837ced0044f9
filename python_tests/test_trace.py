"""`dllm trace`: what a step event says of confidences and rows, what is in the page, and the page in a browser."""

import json
import os
import re

import browser
import models
import numpy as np
import pytest
import torch
from conftest import error_line
from parity import run_engine
from reference import loops, philox
from reference.loops import Options
from reference.model import ReferenceModel

from dllm_ext import ConfigError, Engine, GenerationConfig
from dllm_ext.checks import kinds_of
from dllm_ext.trace import render, trace_data, write_trace

SHORT = ["--gen-length", "6", "--block-length", "4"]
QUESTION = "Tom has 12 apples. He buys 5 more. Then he loses 3. How many apples does Tom have now?"
HOSTILE = (
    '</script><img src=x onerror="window.bad=1"><!--<script>window.bad=2</script> {{script}} \u2028\u202e&lt;\x01\n\'"'
)


def data_in(page):
    """The JSON that a page holds, as a browser would find it: up to the first end of a script element."""
    text = page.split('<script type="application/json" id="data">')[1]
    return json.loads(re.split("</script", text, flags=re.IGNORECASE)[0])


def traced(engine, ids, infill=False, **settings):
    """(result, events, data of the page)."""
    events = []
    config = GenerationConfig(**settings)
    result = engine.generate(ids, config, infill=infill, on_step=events.append)
    return result, events, data_in(render(trace_data(engine, result, events, config, "model")))


# --- Events ---


@pytest.fixture(scope="module", params=models.FAMILIES)
def pair(request, tmp_path_factory):
    folder = models.write_model(tmp_path_factory.mktemp("pair") / "model", request.param)
    return Engine.from_pretrained(folder, dtype="float32"), ReferenceModel.from_folder(folder, torch.float64)


RANKINGS = {
    "low_confidence": {"num_transfer_tokens": 2},
    "low_confidence, sampled": {"num_transfer_tokens": 2, "temperature": 0.7, "seed": 4},
    "topk_margin": {"num_transfer_tokens": 2, "remasking": "topk_margin"},
    "entropy": {"num_transfer_tokens": 2, "remasking": "entropy"},
    "random": {"num_transfer_tokens": 2, "remasking": "random", "seed": 3},
    "origin": {"steps": 6, "schedule": "dream", "remasking": "origin", "seed": 5},
    "prior": {"num_transfer_tokens": 2, "sigma": 4.0},
}


@pytest.mark.parametrize("ranking", RANKINGS)
def test_confidences_are_those_of_a_plain_forward(pair, ranking, one_thread):
    """The canvas before each step, one full forward in fp64, and the definition of docs/semantics.md."""
    engine, oracle = pair
    settings = RANKINGS[ranking]
    events = []
    prompt = [5, 9, 13, 2, 7]
    config = GenerationConfig(gen_length=12, block_length=6, cache="none", stop_at_eos=False, **settings)
    engine.generate(prompt, config, on_step=events.append)
    canvas = prompt + [engine.spec.mask_id] * 12
    seen = 0
    for e in events:
        logits = oracle.full_logits(canvas)
        for p, token, confidence in zip(e.positions, e.token_ids, e.confidences, strict=True):
            q = logits[p - engine.spec.logit_shift].softmax(-1)
            if config.remasking == "topk_margin":
                best = torch.cat([q[: engine.spec.mask_id], q[engine.spec.mask_id + 1 :]]).topk(2).values
                expected = best[0] - best[1]
            elif config.remasking == "entropy":
                expected = (q * q.log()).sum()
            elif config.remasking == "random":
                expected = philox.selection_uniform(config.seed, e.step, [p])[0]
            else:
                expected = q[token]
            assert confidence == pytest.approx(float(expected), rel=2e-4, abs=1e-6)
            seen += 1
        for p, token in zip(e.positions, e.token_ids, strict=True):
            canvas[p] = token
    assert seen == 12


def test_stop_ids_without_confidence(pair):
    engine, _ = pair
    events = []
    settings = {"gen_length": 24, "num_transfer_tokens": 3, "confidence_eos_eot_inf": True, "stop_at_eos": False}
    engine.generate([5, 9, 13], GenerationConfig(**settings), on_step=events.append)
    pairs = [x for e in events for x in zip(e.token_ids, e.confidences, strict=True)]
    assert all((c == 0) == (t in engine.spec.stop_ids) for t, c in pairs)


@pytest.mark.parametrize("cache", ["none", "prefix", "dual", "d2"])
def test_computed_positions_are_the_oracles(pair, cache, one_thread):
    engine, oracle = pair
    prompt = [5, engine.spec.mask_id, 13, 2, 7, 8, 9]
    o = Options(gen_length=12, block_length=4, cache=cache, num_transfer_tokens=2, infill=True, stop_at_eos=False)
    run = loops.generate(oracle, prompt, o)
    _, [events] = run_engine(engine, [prompt], o)
    assert [e.computed for e in events] == [sorted(step.rows) for step in run.steps]
    assert all(e.is_full == (e.computed == list(range(19))) for e in events)


# --- The page's data ---


@pytest.mark.parametrize(
    ("settings", "infill"),
    [
        ({"threshold": 0.3, "cache": "dual"}, False),
        ({"num_transfer_tokens": 3, "cache": "d2"}, True),
        ({"steps": 8, "cache": "dllm", "cfg_scale": 0.5, "block_length": 10}, False),
        ({"num_transfer_tokens": 2, "remasking": "entropy", "stop_at_eos": False}, True),
    ],
    ids=str,
)
def test_data_equals_the_result(engine, settings, infill):
    prompt = [5, engine.spec.mask_id, 13, 2, 7]
    result, events, data = traced(engine, prompt, infill, gen_length=20, **settings)
    filled = data["filled_from"]
    assert data["token_ids"][:filled] == (result.prompt_ids + result.token_ids)[:filled]
    assert set(result.token_ids[filled - 5 :]) <= {engine.spec.eos_id}
    assert data["commit_steps"][5:filled] == result.commit_steps[: filled - 5]
    assert set(result.commit_steps[filled - 5 :]) <= {-1}
    assert [s >= 0 for s in data["commit_steps"][:5]] == [False, infill, False, False, False]
    assert data["pieces"] == engine.tokenizer.pieces(data["token_ids"])
    confidences = {p: c for e in events for p, c in zip(e.positions, e.confidences, strict=True)}
    assert [c for c in data["confidences"] if c is not None] == pytest.approx(
        [confidences[p] for p in sorted(confidences)], rel=1e-5
    )
    steps, streams = data["steps"], 2 if settings.get("cfg_scale") else 1
    assert [streams * rows for rows in steps["rows"]] == result.stats.rows
    assert steps["commits"] == result.stats.commits
    assert steps["ms"] == pytest.approx([1e3 * s for s in result.stats.seconds], abs=1e-3)
    assert [[p for a, b in zip(r[::2], r[1::2], strict=True) for p in range(a, b)] for r in steps["computed"]] == [
        e.computed for e in events
    ]
    assert (data["nfe"], data["tokens"]) == (result.nfe, result.stats.tokens)
    assert {k: v for k, v in data["config"].items() if k in settings} == settings


def test_settings_of_the_cache_in_use(engine):
    assert "kp" not in traced(engine, [5], gen_length=4)[2]["config"]
    config = traced(engine, [5], gen_length=4, cache="dllm")[2]["config"]
    assert (config["kp"], "current_k" in config, config["threshold"]) == (50, False, 0.9)


def test_hostile_texts_stay_in_the_data(llada):
    """No character of a text, a model's name or a setting can end the element, whatever the texts are."""
    _, _, data = traced(llada, llada.encode(HOSTILE, chat=False), gen_length=4)
    assert "".join(data["pieces"][: data["prompt_length"]]) == HOSTILE
    data["model"] = HOSTILE
    page = render(data)
    assert page.count("<img") == 0 and page.lower().count("<script") == 2 == page.lower().count("</script")
    assert data_in(page) == data
    assert page.partition('id="data">')[2].partition("<")[0].isascii()


def test_page_loads_nothing(llada):
    page = render(traced(llada, [5], gen_length=4)[2])
    assert not re.findall(r"""(?:src|href)\s*=|https?://|url\(|@import|\bfetch\(|innerHTML|XMLHttp""", page)
    assert "default-src 'none'" in page


def test_without_a_tokenizer(tmp_path):
    engine = Engine.from_pretrained(models.write_model(tmp_path / "model", "llada"), dtype="float32")
    result = write_trace(tmp_path / "t.html", engine, [5, 7], GenerationConfig(gen_length=4))
    data = data_in((tmp_path / "t.html").read_text())
    assert data["pieces"] == [f"[{t}]" for t in data["token_ids"]] and result.text is None
    assert data["model"] == "model"


# --- The command ---


def test_command(dllm, llada, llada_folder, tmp_path):
    file = tmp_path / "out.html"
    file.write_text("something longer than nothing")
    code, out, err = dllm("trace", "Hi", "-o", file, "--model", llada_folder, "--cache", "dual", *SHORT)
    result = llada.generate("Hi", gen_length=6, block_length=4, cache="dual")
    assert (code, err) == (0, "")
    assert out.startswith(f"{file}: {result.nfe} steps, {result.stats.tokens} tokens, ") and out.endswith(" kB\n")
    data = data_in(file.read_text())
    assert data["token_ids"][: data["prompt_length"]] == llada.encode("Hi")
    assert data["commit_steps"][data["prompt_length"] : data["filled_from"]] == [
        s for s in result.commit_steps if s >= 0
    ]
    assert data["config"]["cache"] == "dual" and data["model"] == llada_folder.name


def test_command_has_all_options(dllm, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    code, out, _ = dllm("trace", "--help")
    assert code == 0 and "--infill" in out and "--current-k" in out
    for name in kinds_of(GenerationConfig):
        assert f"-{name.replace('_', '-')} " in out


def test_infill_command(dllm, llada_folder, tmp_path):
    file = tmp_path / "out.html"
    used = ["--infill", "--gen-length", 0, "--model", llada_folder]
    assert dllm("trace", "a<|mdm_mask|>b", "-o", file, *used)[0] == 0
    data = data_in(file.read_text())
    assert data["commit_steps"] == [-1, 0, -1] and data["filled_from"] == 3


def test_bad_paths(dllm, llada, llada_folder, tmp_path):
    (tmp_path / "file").write_text("")
    for path, words in [
        (tmp_path / "no" / "t.html", "there is no folder"),
        (tmp_path / "file" / "t.html", "there is no folder"),
        (tmp_path, "it is a folder"),
    ]:
        line = error_line(dllm("trace", "Hi", "-o", path, "--model", "no-such-model"))  # said before it is looked for
        assert words in line and repr(str(path)) in line
    with pytest.raises(ConfigError, match="path = 3 is not allowed"):
        write_trace(3, llada, [5], GenerationConfig())


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_full_disk(dllm, llada_folder):
    line = error_line(dllm("trace", "Hi", "-o", "/dev/full", "--model", llada_folder, *SHORT))
    assert "path = '/dev/full' is not allowed: it cannot be written: No space left" in line


# --- The page in a browser ---


@pytest.fixture(scope="module")
def open_page():
    """open_page(file, fragment) -> Page, loaded. One browser for all tests; it is offline."""
    executable = browser.find()
    if not executable:
        reason = "no Chromium: not in CHROMIUM, and none of " + ", ".join(browser.NAMES)
        if os.environ.get("DLLM_REQUIRE_BROWSER") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    with browser.Page(executable) as page:

        def opened(file, fragment=""):
            page.errors.clear(), page.requests.clear()
            page.open(file, fragment)
            return page

        yield opened


@pytest.fixture(scope="module")
def mini(tmp_path_factory):
    """(file, data) of a generation of the bundled model."""
    engine = Engine.from_pretrained("mini-llada", dtype="float32")
    file = tmp_path_factory.mktemp("trace") / "mini.html"
    config = GenerationConfig(gen_length=48, num_transfer_tokens=3, cache="d2", block_length=16)
    result = write_trace(file, engine, engine.encode(QUESTION), config)
    assert result.text.endswith("#### 14")
    return file, data_in(file.read_text())


def shown(page):
    """[text, classes] of every token on the page, in order of position."""
    script = (
        "[...document.querySelectorAll('[data-position]')].map(e => [+e.dataset.position, e.textContent, e.className])"
    )
    found = page.evaluate(script)
    assert [p for p, *_ in found] == list(range(len(found)))
    return [(text, set(classes.split())) for _, text, classes in found]


def expected(data, k):
    """What the canvas shows after k steps, where no character spans several tokens."""
    out = []
    last = len(data["steps"]["rows"])
    computed = {p for a, b in _pairs(data["steps"]["computed"][k - 1]) for p in range(a, b)} if k else set()
    stop = data["filled_from"] - 1
    for p, (piece, step) in enumerate(zip(data["pieces"], data["commit_steps"], strict=True)):
        at_end = p > stop and k == last
        if p < data["prompt_length"]:
            text, classes = piece, {"given"}
        elif at_end:
            text, classes = "▪", {"fill"}
        elif step < 0 or step >= k:
            text, classes = "", {"masked"}
        else:
            text = "▪" if data["token_ids"][p] in data["stop_ids"] else piece
            classes = {"known"} | ({"fresh"} if step == k - 1 else set())
        if p > stop and not at_end and k > data["commit_steps"][stop]:
            classes |= {"out"}
        out.append((text, {"token"} | classes | ({"computed"} if p in computed else set())))
    return out


def _pairs(runs):
    return zip(runs[::2], runs[1::2], strict=True)


def clean(page, file):
    """Nothing went wrong, and nothing but the file was asked for."""
    page.evaluate("0")  # what happened before this has been told by then
    assert page.errors == []
    assert set(page.requests) <= {"about:blank", file.resolve().as_uri()}


def test_the_browser_notes_what_goes_wrong(open_page, mini):
    """What `clean` relies on. The page's own policy stops other scripts and requests."""
    page = open_page(mini[0])
    for trouble in (
        "setTimeout(() => { throw Error('thrown') }), 0",
        "console.error('told')",
        "document.body.append(Object.assign(document.createElement('script'), {textContent: 'window.bad = 1'}))",
        "document.body.append(Object.assign(document.createElement('img'), {src: 'http://localhost/x.png'}))",
        "fetch('data:,x').then(() => 'loaded', () => 'refused')",
    ):
        page.errors.clear()
        page.evaluate(trouble + ", 0")
        page.evaluate("new Promise(done => setTimeout(done, 100))")
        assert page.errors, trouble
    assert page.evaluate("window.bad") is None


def set_slider(page, k):
    page.evaluate(f"(s => {{ s.value = {k}; s.dispatchEvent(new Event('input')) }})(document.getElementById('slider'))")


def test_every_step_of_the_canvas(open_page, mini):
    file, data = mini
    page = open_page(file)
    last = len(data["steps"]["rows"])
    assert last > 5 and data["filled_from"] < len(data["token_ids"])
    assert shown(page) == expected(data, last)
    for k in [*range(last + 1), 2]:
        set_slider(page, k)
        assert shown(page) == expected(data, k), k
        status = page.evaluate("document.getElementById('status').textContent")
        assert status.startswith(f"step {k} of {last} · " if k else "before the first")
        if k:
            assert f"· {data['steps']['rows'][k - 1]} of {len(data['token_ids'])} rows computed" in status
            assert ("(full step)" in status) == bool(data["steps"]["full"][k - 1])
    clean(page, file)


def test_keys_and_buttons(open_page, mini):
    file, data = mini
    page = open_page(file, "#2")
    last = len(data["steps"]["rows"])
    state = "Number(document.getElementById('slider').value)"
    assert page.evaluate(state) == 2
    page.click(5, 5)  # anywhere: the keys are the page's
    for key, k in [("ArrowRight", 3), ("ArrowLeft", 2), ("Home", 0), ("ArrowLeft", 0), ("PageDown", min(10, last))]:
        page.press(key)
        assert page.evaluate(state) == k, key
    for key, k in [("End", last), ("ArrowRight", last), ("PageUp", max(last - 10, 0))]:
        page.press(key)
        assert page.evaluate(state) == k, key
    for button, k in [("first", 0), ("next", 1), ("next", 2), ("back", 1), ("last", last)]:
        page.click_on(f"#{button}")
        assert page.evaluate(state) == k, button
    clean(page, file)


@pytest.mark.parametrize("way", ["key", "button", "as it was"])
def test_play(open_page, mini, way):
    """From the end it begins anew; every step is shown on the way, and pausing stays where it is."""
    file, data = mini
    page = open_page(file)
    last = len(data["steps"]["rows"])
    speed = "real" if way == "as it was" else "30"
    page.evaluate(f"document.getElementById('speed').value = '{speed}'")
    page.evaluate(
        "window.seen = []; new MutationObserver(() => seen.push(document.getElementById('status').textContent))"
        ".observe(document.getElementById('status'), {childList: true})"
    )
    page.click_on("#play") if way == "button" else page.press(" ")
    page.wait_for(f"document.getElementById('slider').value === '{last}'")
    assert page.evaluate("document.getElementById('play').getAttribute('aria-label')") == "Play"
    assert shown(page) == expected(data, last)
    if way == "key":  # 30 steps a second; at the speed of the model several may fall into one frame
        assert page.evaluate("seen.length") >= last / 2
        page.evaluate("document.getElementById('speed').value = '5'")
        page.press(" ")
        page.wait_for("document.getElementById('slider').value === '1'")
        page.press(" ")
        page.evaluate("new Promise(done => setTimeout(done, 500))")
        assert page.evaluate("document.getElementById('slider').value") in ("1", "2")
    clean(page, file)


def test_colours(open_page, mini):
    """By step and by confidence: as many colours as values, in the order of the palette, and the legend says which."""
    file, data = mini
    page = open_page(file)
    get = (
        "[...document.querySelectorAll('#answer .known')].map(e => [+e.dataset.position, e.style.backgroundColor, "
        "e.style.color])"
    )
    legend = "['low', 'high', 'mode-name'].map(id => document.getElementById(id).textContent)"
    by_step = page.evaluate(get)
    assert page.evaluate(legend) == ["1", str(len(data["steps"]["rows"])), "committed by step"]
    pairs = {(data["commit_steps"][p], color) for p, color, _ in by_step}
    assert len(pairs) == len({s for s, _ in pairs}) == len({c for _, c in pairs})
    page.click_on("input[value=confidence]")
    by_confidence = page.evaluate(get)
    assert page.evaluate(legend) == ["0", "1", "confidence: probability of the token"]
    assert [c for _, c, _ in by_confidence] != [c for _, c, _ in by_step]
    light = {data["confidences"][p]: sum(map(int, re.findall(r"\d+", color))) for p, color, _ in by_confidence}
    assert [light[c] for c in sorted(light)] == sorted(light.values())
    for _, back, text in by_step + by_confidence:  # legible: the contrast of WCAG 2's AA for large text
        assert _contrast(back, text) >= 3, (back, text)
    page.click(5, 5)
    page.press("c")
    assert page.evaluate(get) == by_step
    clean(page, file)


def _contrast(a, b):
    def luminance(color):
        x = np.array([int(n) for n in re.findall(r"\d+", color)][:3]) / 255
        return np.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722]

    low, high = sorted([luminance(a), luminance(b)])
    return (high + 0.05) / (low + 0.05)


def test_clicks_on_the_timeline_and_tips(open_page, mini):
    file, data = mini
    page = open_page(file)
    last = len(data["steps"]["rows"])
    width = page.evaluate("columnWidth() / document.getElementById('map').clientWidth")
    for panel, k in [("map", 1), ("rows", 3), ("commits", last), ("ms", 2)]:
        page.click_on(f"#{panel}", (k - 0.5) * width)
        assert page.evaluate("document.getElementById('slider').value") == str(k), panel
        assert page.evaluate("document.getElementById('tip').textContent").startswith(f"step {k} of {last}\n")
    p = data["prompt_length"] + 3
    page.click_on(f"[data-position='{p}']")
    tip = page.evaluate("document.getElementById('tip').textContent")
    step = data["commit_steps"][p]
    assert f"id {data['token_ids'][p]}\nposition {p} (4 of the answer)" in tip
    assert f"step {step + 1} of {last}, block {data['steps']['block'][step] + 1}" in tip
    confidence = float(re.search(r"confidence: probability of the token (\S+)", tip)[1])
    assert confidence == pytest.approx(data["confidences"][p], rel=1e-3)
    clean(page, file)


def test_hostile_texts_in_a_browser(open_page, llada, tmp_path):
    _, _, data = traced(llada, llada.encode(HOSTILE, chat=False), gen_length=6)
    data["model"] = HOSTILE
    data["pieces"][-1] = HOSTILE
    data["config"]["cache"] = HOSTILE
    file = tmp_path / "hostile.html"
    file.write_text(render(data))
    page = open_page(file)
    assert page.evaluate("[window.bad, document.images.length, document.scripts.length]") == [None, 0, 2]
    assert page.evaluate("document.getElementById('model').textContent") == HOSTILE
    text = "".join(text for text, _ in shown(page)[: data["prompt_length"]])
    assert text == HOSTILE.replace("\n", "↵").replace("\x01", "\u2401")
    page.click_on("[data-position]")  # a tip, too
    clean(page, file)


def test_characters_of_several_tokens(open_page, llada, tmp_path):
    """A character shows at its last token, once all of them are there; until then each is unreadable."""
    _, _, data = traced(llada, [40, 41], gen_length=6, num_transfer_tokens=1, stop_at_eos=False)
    data["stop_ids"] = []
    data["pieces"] = ["a", "b", "c", "", "", "€", "d", ""]
    data["commit_steps"] = [-1, -1, 0, 3, 1, 2, 4, 5]
    data["confidences"] = [None, None] + [0.5] * 6
    file = tmp_path / "characters.html"
    file.write_text(render(data))
    page = open_page(file)
    texts = []
    for k in range(7):
        set_slider(page, k)
        texts.append([text for text, _ in shown(page)[2:]])
    bad = "\ufffd"
    assert texts == [
        ["", "", "", "", "", ""],
        ["c", "", "", "", "", ""],
        ["c", "", bad, "", "", ""],
        ["c", "", bad, bad, "", ""],
        ["c", "", "", "€", "", ""],
        ["c", "", "", "€", "d", ""],
        ["c", "", "", "€", "d", bad],
    ]
    clean(page, file)


def test_infilled_prompts_and_empty_answers(open_page, llada, tmp_path):
    mask = llada.spec.mask_id
    _, _, data = traced(llada, [40, mask, 41], True, gen_length=0)
    (tmp_path / "infill.html").write_text(render(data))
    page = open_page(tmp_path / "infill.html", "#0")
    assert [c for _, c in shown(page)] == [{"token", "given"}, {"token", "masked"}, {"token", "given"}]
    page.press("End")
    assert shown(page)[1][0] == data["pieces"][1] != ""
    clean(page, tmp_path / "infill.html")

    # The first token is a stop id; behind it one position was committed and is overwritten, the others never were.
    _, _, data = traced(llada, [40], gen_length=4, num_transfer_tokens=1, stop_at_eos=False)
    data |= {"tokens": 0, "filled_from": 2, "commit_steps": [-1, 1, 0, -1, -1], "tokens_per_second": 0.0}
    data["confidences"] = [None, 0.5, 0.25, None, None]
    data["token_ids"] = [40, llada.spec.eos_id, 66, llada.spec.eos_id, llada.spec.eos_id]
    data["pieces"] = llada.tokenizer.pieces(data["token_ids"])
    data["steps"] = {name: values[:2] for name, values in data["steps"].items()}
    (tmp_path / "empty.html").write_text(render(data))
    page = open_page(tmp_path / "empty.html")
    for k in (0, 1, 2):
        set_slider(page, k)
        assert shown(page) == expected(data, k)
    assert [text for text, _ in shown(page)[1:]] == ["▪"] * 4
    clean(page, tmp_path / "empty.html")


def test_long_generations_stay_fast(open_page, llada, tmp_path):
    """1,024 steps of one token each, with a tenth of the rows scattered: a small file, quick to step through."""
    n, given = 1024, 200
    _, _, data = traced(llada, [40], gen_length=4)
    order = np.random.default_rng(0).permutation(n)
    runs = [[x for p in range(step % 5, given + n, 10) for x in (p, p + 2)][: 2 * 60] for step in range(n)]
    data |= {"prompt_length": given, "filled_from": given + n, "token_ids": [70] * (given + n)}
    data |= {"pieces": [" word"] * (given + n), "commit_steps": [-1] * given + order.tolist()}
    data |= {"confidences": [None] * given + [0.123456] * n}
    data["steps"] = {"block": [0] * n, "rows": [120] * n, "full": [0] * n, "computed": runs, "commits": [1] * n}
    data["steps"]["ms"] = [12.3456] * n
    file = tmp_path / "long.html"
    file.write_text(render(data))
    assert file.stat().st_size < 1_000_000
    page = open_page(file)
    loaded = page.evaluate("performance.now()")
    ms = page.evaluate(
        "(t => { for (let k = 0; k <= 200; ++k) { go(k); document.body.offsetHeight; } return performance.now() - t; })"
        "(performance.now()) / 201"
    )
    print(f"\n{file.stat().st_size / 1e3:.0f} kB, {loaded:.0f} ms to load, {ms:.1f} ms per step with layout")
    assert ms < 100  # some milliseconds where nothing else runs
    clean(page, file)

"""The command dllm: every command, every option, errors as one line, and the live canvas."""

import io
import json
import os
import pty
import signal
import subprocess
import sys
import time

import models
import pytest
from conftest import error_line, write_tokenizer
from rich.console import Console

from dllm_ext import D2Cache, DLLMCache, GenerationConfig, StepEvent, TokenFrequencies, cli, watch
from dllm_ext.checks import kinds_of

SHORT = ["--gen-length", "6", "--block-length", "4"]


# generate


def test_generate_prints_the_text(dllm, llada, llada_folder):
    code, out, err = dllm("generate", "Hi", "--model", llada_folder, *SHORT)
    assert (code, err) == (0, "")
    assert out == llada.generate("Hi", gen_length=6, block_length=4).text + "\n"


def test_generate_json(dllm, llada, llada_folder):
    code, out, err = dllm("generate", "Hi", "--model", llada_folder, "--json", *SHORT)
    data = json.loads(out)
    expected = llada.generate("Hi", gen_length=6, block_length=4).to_dict()
    assert (code, err) == (0, "") and set(data) == set(expected)
    assert all(data[name] == expected[name] for name in expected if name != "stats")


@pytest.mark.parametrize("arguments", [[], ["-"]], ids=str)
def test_prompt_from_stdin(dllm, llada, llada_folder, arguments):
    _, out, _ = dllm("generate", *arguments, "--model", llada_folder, "--json", *SHORT, stdin="Hi\nthere\n")
    assert json.loads(out)["prompt_ids"] == llada.encode("Hi\nthere")


@pytest.mark.parametrize("stdin", ["", "\n"], ids=repr)
def test_empty_prompt(dllm, llada_folder, stdin):
    assert "prompt is empty" in error_line(dllm("generate", "--model", llada_folder, stdin=stdin))


def test_plain_and_chat(dllm, llada, llada_folder):
    for option, chat in (("--plain", False), ("--chat", True)):
        _, out, _ = dllm("generate", "Hi", option, "--model", llada_folder, "--json", *SHORT)
        assert json.loads(out)["prompt_ids"] == llada.encode("Hi", chat=chat)


def test_infill_shows_the_filled_prompt(dllm, llada, llada_folder):
    code, out, _ = dllm("generate", "a<|mdm_mask|>b", "--infill", "--gen-length", 0, "--model", llada_folder)
    filled = llada.generate("a<|mdm_mask|>b", infill=True, gen_length=0).prompt_ids
    assert code == 0 and out == "".join(llada.tokenizer.pieces(filled)) + "\n"
    assert out[0] == "a" and "mdm_mask" not in out


VALUES = {
    "gen_length": 12,
    "block_length": 6,
    "steps": 8,
    "num_transfer_tokens": 2,
    "temperature": 0.5,
    "top_p": 0.9,
    "top_k": 5,
    "remasking": "topk_margin",
    "schedule": "dream",
    "eps": 0.01,
    "alg_temp": 0.5,
    "threshold": 0.7,
    "factor": 1.5,
    "gamma": 0.1,
    "kl_threshold": 0.01,
    "kl_history_length": 3,
    "sigma": 5.0,
    "clip_alpha": 4.0,
    "position_decay": 0.25,
    "autoregressive": True,
    "cfg_scale": 0.5,
    "logits_eos_inf": True,
    "confidence_eos_eot_inf": True,
    "stop_at_eos": False,
    "seed": 2**64 - 1,
    "cache": "dual",
    "reference_quirks": True,
}
CACHE_VALUES = {  # option: value and the cache it belongs to
    "kp": (5, DLLMCache(kp=5)),
    "kr": (1, DLLMCache(kr=1)),
    "rou": (0.5, DLLMCache(rou=0.5)),
    "always_refresh_layers": ("0,2", DLLMCache(always_refresh_layers=(0, 2))),
    "cfg_interval_steps": (2, DLLMCache(cfg_interval_steps=2)),
    "rollout_p": (0.2, D2Cache(rollout_p=0.2)),
    "current_k": (8, D2Cache(current_k=8)),
    "d2_sigma": (3.0, D2Cache(sigma=3)),
    "inflate_w": (0, D2Cache(inflate_w=0)),
}


@pytest.fixture
def configs(monkeypatch):
    """The configs that generations of the command get, in order."""
    seen = []

    def record(engine, ids, config, infill, watch):
        seen.append(config)
        return engine.generate(ids, config, infill=infill)

    monkeypatch.setattr(cli, "_run", record)
    return seen


@pytest.mark.parametrize("command", ["generate", "chat"])
@pytest.mark.parametrize("name", VALUES)
def test_every_field_is_an_option(dllm, llada_folder, configs, command, name):
    """Each option reaches GenerationConfig as its field, alone; the list above is complete."""
    assert {*VALUES, "token_frequencies"} == set(kinds_of(GenerationConfig))
    value = VALUES[name]
    flag = "--" + name.replace("_", "-")
    used = {True: [flag], False: ["--no-" + flag[2:]]}[value] if isinstance(value, bool) else [flag, value]
    fields = {name: value}
    if name == "alg_temp":  # has a meaning only beside a rule that gives a number
        used += ["--num-transfer-tokens", 1]
        fields["num_transfer_tokens"] = 1
    arguments = ["Hi"] if command == "generate" else []
    code, _, err = dllm(command, *arguments, "--model", llada_folder, *used, stdin="Hi\n")
    assert (code, err) == (0, "")
    assert configs == [GenerationConfig(**fields)]


@pytest.mark.parametrize("name", CACHE_VALUES)
def test_every_cache_setting_is_an_option(dllm, llada_folder, configs, name):
    value, cache = CACHE_VALUES[name]
    fields = {"gen_length": 6, "cache": cache, "cfg_scale": 0.5 if name == "cfg_interval_steps" else 0}
    used = [f"--{name.replace('_', '-')}", value, "--cache", cache.name, "--cfg-scale", fields["cfg_scale"]]
    code, _, err = dllm("generate", "Hi", "--model", llada_folder, "--gen-length", 6, *used)
    assert (code, err) == (0, "")
    assert configs == [GenerationConfig(**fields)]
    other = {"dllm": "d2", "d2": "prefix"}[cache.name]
    line = error_line(dllm("generate", "Hi", "--cache", other, *used[:2]))
    assert line == f'error: {name} is not allowed without cache = "{cache.name}"\n'


def test_no_layers_to_refresh_always(dllm, llada_folder, configs):
    used = ["--cache", "dllm", "--always-refresh-layers", ""]
    assert dllm("generate", "Hi", "--model", llada_folder, *SHORT, *used)[0] == 0
    assert configs[0].cache == DLLMCache(always_refresh_layers=())


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_token_frequencies_come_from_a_file(dllm, llada, llada_folder, configs, tmp_path, command):
    frequencies = TokenFrequencies.from_counts({7: 5, 9: 2}, 20, llada.spec.vocab_size)
    frequencies.save(tmp_path / "f.json")
    arguments = ["Hi"] if command == "generate" else []
    used = ["--token-frequencies", tmp_path / "f.json", *SHORT]
    code, _, err = dllm(command, *arguments, "--model", llada_folder, *used, stdin="Hi\n")
    assert (code, err) == (0, "")
    assert configs == [GenerationConfig(gen_length=6, block_length=4, token_frequencies=frequencies)]


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_help_describes_every_field(dllm, command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    code, out, _ = dllm(command, "--help")
    assert code == 0
    for name, value in [*VALUES.items(), ("token_frequencies", ""), *CACHE_VALUES.items()]:
        assert f"--{'no-' if value is False else ''}{name.replace('_', '-')} " in out
    assert "arXiv 2505.22618" in out and "[default: 32]" in out and "[default: (0.25)]" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--threshold", "2"], "threshold = 2"),
        (["--cache", "magic"], '"none", "prefix", "dual"'),
        (["--steps", "4", "--threshold", "0.5"], "steps, threshold"),
        (["--model", "no-such-model"], "'no-such-model' does not exist"),
        (["--dtype", "int3"], "dtype = 'int3'"),
        (["--device", "cuda"], 'device = "cuda"'),
        (["--json", "--watch"], "exclude each other"),
        (["--gen-length", "99999999"], "gen_length = 99999999"),
        (["--gen-length", "9999"], "context of 4096"),
        (["--cache", "d2", "--current-k", "0"], "current_k = 0"),
        (["--cache", "dllm", "--always-refresh-layers", "9"], "always_refresh_layers holds 9"),
        (["--token-frequencies", "no-such-file.json"], "'no-such-file.json' cannot be read"),
    ],
    ids=str,
)
def test_errors_are_one_line(dllm, llada_folder, arguments, words):
    assert words in error_line(dllm("generate", "Hi", "--model", llada_folder, *arguments))


def test_error_message_of_several_lines_becomes_one(dllm, llada_folder, monkeypatch):
    def fail(*args):
        raise cli.InputError("first\n  second\n")

    monkeypatch.setattr(cli, "_run", fail)
    assert error_line(dllm("generate", "Hi", "--model", llada_folder)) == "error: first second\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "Hi", "--steps", "many"],
        ["generate", "Hi", "--beta", "1"],
        ["generate", "Hi", "--always-refresh-layers", "0,x"],
        ["dance"],
        ["bench", "--repeat", "0"],
    ],
    ids=str,
)
def test_wrong_usage(dllm, arguments):
    code, out, err = dllm(*arguments)
    assert code == 2 and out == "" and "Traceback" not in err
    assert any(word in err for word in arguments[-2:])


def test_a_bug_is_not_hidden(llada_folder, monkeypatch):
    def bug(*args):
        raise ZeroDivisionError

    monkeypatch.setattr(cli, "_run", bug)
    with pytest.raises(ZeroDivisionError):
        cli.main(["generate", "Hi", "--model", str(llada_folder)])


def test_ctrl_c(dllm, llada_folder, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_run", interrupt)
    code, out, err = dllm("generate", "Hi", "--model", llada_folder)
    assert (code, out) == (130, "") and "Traceback" not in err


def test_ctrl_c_of_a_running_process(llada_folder):
    code = """if True:
        import sys, dllm_ext
        from dllm_ext import cli
        run = cli._run
        def announced(engine, *arguments):
            _ = engine.generate("Hi", gen_length=1)  # everything that is imported late is imported now
            print("generating", flush=True)
            return run(engine, *arguments)
        cli._run = announced
        cli.main()
    """
    command = [sys.executable, "-c", code, "generate", "Hi", "--model", str(llada_folder)]
    command += ["--gen-length", "4000", "--num-transfer-tokens", "1", "--no-stop-at-eos"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "generating\n"
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (130, "") and "Traceback" not in err


# chat


def test_chat_remembers(dllm, llada, llada_folder):
    code, out, err = dllm("chat", "--model", llada_folder, *SHORT, stdin="Hi\n\nAnd?\n/exit\nnever read\n")
    assert (code, err) == (0, "")
    fields = {"gen_length": 6, "block_length": 4}
    first = llada.generate("Hi", **fields)
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": first.text}]
    second = llada.generate([*turns, {"role": "user", "content": "And?"}], **fields)
    assert out == f"{first.text}\n{second.text}\n"


def test_chat_reset_and_end_of_input(dllm, llada, llada_folder):
    code, out, _ = dllm("chat", "--model", llada_folder, *SHORT, stdin="Hi\n/reset\nHi\n")
    reply = llada.generate("Hi", gen_length=6, block_length=4).text
    assert code == 0 and out == f"{reply}\n{reply}\n"


def test_chat_beyond_the_context_goes_on(dllm, tmp_path):
    models.write_model(tmp_path, "llada", max_sequence_length=40)
    write_tokenizer(tmp_path, "llada")
    long = "x" * 100
    code, out, err = dllm("chat", "--model", tmp_path, *SHORT, stdin=f"{long}\nHi\n")
    assert code == 0 and out.count("\n") >= 1
    assert "context of 40" in err and "/reset" in err


def test_chat_without_a_template(dllm, tmp_path):
    models.write_model(tmp_path, "llada")
    write_tokenizer(tmp_path, "llada", chat_template=None)
    file = tmp_path / "tokenizer.json"
    file.write_text(file.read_text().replace("<|start_header_id|>", "<|other|>"))
    assert "no chat template" in error_line(dllm("chat", "--model", tmp_path, stdin="Hi\n"))


def test_model_without_tokenizer(dllm, tmp_path):
    models.write_model(tmp_path, "llada")
    for command in (["generate", "Hi"], ["chat"], ["bench"]):
        assert "no tokenizer files" in error_line(dllm(*command, "--model", tmp_path, stdin="Hi\n"))


# info and bench


def test_info(dllm):
    import torch

    code, out, err = dllm("info", "--json")
    facts = json.loads(out)
    assert (code, err) == (0, "")
    assert facts["torch"] == torch.__version__ and facts["threads"] == torch.get_num_threads()
    assert facts["instruction set"] in facts["instruction sets available"]
    assert facts["CUDA"] == "built" or len(facts["CUDA"]) > 10  # why not
    assert "mini-llada" in facts["bundled models"][0]
    _, table, _ = dllm("info")
    assert len(table.splitlines()) == len(facts)
    assert all(name in table for name in facts) and ", ".join(facts["instruction sets available"]) in table


def test_info_shows_the_chosen_instruction_set():
    command = [sys.executable, "-m", "dllm_ext", "info", "--json"]
    out = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | {"DLLM_ISA": "portable"})
    assert json.loads(out.stdout)["instruction set"] == "portable"


def test_bench(dllm, llada_folder):
    arguments = ["bench", "--model", llada_folder, "--gen-length", 8, "--block-length", 4, "--repeat", 1]
    code, out, _ = dllm(*arguments, "--json")
    data = json.loads(out)
    assert code == 0 and data["gen_length"] == 8
    assert [r["cache"] for r in data["rows"][::2]] == ["none", "prefix", "dual", "dllm", "d2"]
    assert [r["cache"] for r in data["rows"][1::2]] == ["none", "prefix", "dual", "dllm", "d2"]
    assert [r.get("threshold") for r in data["rows"]] == [None, 0.9] * 5
    assert all(1 <= r["nfe"] <= 8 and r["ms_per_forward"] > 0 and r["tokens_per_second"] >= 0 for r in data["rows"])
    code, table, _ = dllm(*arguments)
    assert code == 0 and all(word in table for word in ("prefix", "dllm", "d2", "tokens/s", "1 per step"))


def test_no_command_shows_help(dllm):
    code, out, err = dllm()
    assert code in (0, 2) and all(word in out + err for word in ("generate", "chat", "info", "bench"))


# The canvas


def event(step, positions, tokens, block=0, rows=9):
    class Event:
        sequence = 0

    e = Event()
    e.step, e.positions, e.token_ids, e.block, e.rows, e.is_full = step, positions, tokens, block, rows, True
    e.confidences, e.computed = [1.0] * len(tokens), list(range(rows))
    assert all(hasattr(e, name) for name in dir(StepEvent) if not name.startswith("_"))
    return e


def styles(text):
    """Plain character -> style, of a canvas without repeated characters and without its status line."""
    line = text.plain.index("\n")
    return {text.plain[i]: str(s.style) for s in text.spans for i in range(s.start, min(s.end, line))}


def test_canvas_fills_in(llada):
    ids = llada.tokenizer.encode
    canvas = watch.Canvas(llada, ids("Q"), 4, infill=False)
    assert canvas.render().plain.startswith(watch.MASK * 4 + "\n")
    canvas.add(event(0, [2, 4], ids("ac")))
    assert canvas.render().plain.startswith(f"{watch.MASK}a{watch.MASK}c\nstep 1, block 1: 9 rows computed, 2 tokens")
    canvas.add(event(5, [1], ids("x"), block=1))
    text = canvas.render()
    assert text.plain.startswith(f"xa{watch.MASK}c\nstep 6, block 2: 9 rows computed, 1 tokens committed, 3 of 4")
    style = styles(text)
    assert style["a"] == style["c"] == watch.color_of(0) and style["x"] == watch.color_of(5)
    assert len({style["a"], style["x"], style[watch.MASK]}) == 3


def test_canvas_joins_characters_of_several_tokens(llada):
    ids = llada.tokenizer.encode("é!")
    canvas = watch.Canvas(llada, [], 3, infill=False)
    canvas.add(event(0, [1], ids[1:2]))
    assert "é" not in canvas.render().plain
    canvas.add(event(1, [0, 2], [ids[0], ids[2]]))
    assert canvas.render().plain.startswith("é!\n")


def test_canvas_ends_at_the_stop_id(llada):
    canvas = watch.Canvas(llada, [1], 4, infill=False)
    canvas.add(event(0, [1, 2, 4], [*llada.tokenizer.encode("a"), llada.spec.eos_id, llada.spec.eos_id]))
    assert canvas.render().plain.startswith(f"a{watch.END}{watch.MASK}{watch.END}\n")
    assert canvas.render(finished=True).plain.startswith(f"a{watch.END}\n")


def test_canvas_of_an_infill_shows_the_prompt(llada):
    ids = llada.tokenizer.encode("a<|mdm_mask|>b")
    canvas = watch.Canvas(llada, ids, 1, infill=True)
    assert canvas.render().plain.startswith(f"a{watch.MASK}b{watch.MASK}\n")
    canvas.add(event(0, [1], llada.tokenizer.encode("z")))
    text = canvas.render()
    assert text.plain.startswith(f"azb{watch.MASK}\n") and "1 of 2" in text.plain
    assert styles(text)["z"] == watch.color_of(0) != styles(text)["a"]


def test_colors():
    colors = [watch.color_of(i) for i in range(watch.STEPS_PER_CYCLE)]
    assert len(set(colors)) == watch.STEPS_PER_CYCLE
    assert watch.color_of(watch.STEPS_PER_CYCLE) == colors[0]
    assert all(len(c) == 7 and int(c[1:], 16) >= 0 for c in colors)


def test_watch_gives_the_same_result(engine, monkeypatch):
    monkeypatch.setattr(watch, "SECONDS_PER_STEP", 0)
    screen = Console(file=io.StringIO(), force_terminal=True, color_system="truecolor", width=60)
    config = GenerationConfig(gen_length=6, block_length=4)
    ids = engine.encode("Hi")
    result = watch.watch(engine, ids, config, console=screen)
    assert result.token_ids == engine.generate(ids, config).token_ids
    written = screen.file.getvalue()
    assert watch.MASK in written and "\x1b[38;2;" in written and f"{result.nfe}, block" in written


def run_in_terminal(command):
    """Output of a command whose stdout and stderr are a terminal."""
    leader, follower = pty.openpty()
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=follower, stderr=follower)
    os.close(follower)
    output = b""
    try:
        while chunk := os.read(leader, 65536):
            output += chunk
    except OSError:  # the other end is closed
        pass
    os.close(leader)
    return process.wait(30), output.decode(errors="replace")


def test_watch_in_a_terminal(llada_folder):
    command = [sys.executable, "-m", "dllm_ext", "generate", "Hi", "--model", str(llada_folder), "--watch", *SHORT]
    code, output = run_in_terminal(command)
    assert code == 0
    assert watch.MASK in output and "rows computed" in output and "\x1b[" in output
    assert "ms per forward]" in output  # the summary line


def test_watch_without_a_terminal_is_plain(dllm, llada_folder):
    plain = dllm("generate", "Hi", "--model", llada_folder, *SHORT)
    assert dllm("generate", "Hi", "--model", llada_folder, "--watch", *SHORT) == plain

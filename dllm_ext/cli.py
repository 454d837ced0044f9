"""The command `dllm`: generate, chat, trace, info, bench and quantize.

The options that decode are made from the fields of GenerationConfig and of the caches, one for each.
"""

import dataclasses
import importlib
import inspect
import itertools
import json
import platform
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from . import __version__
from .checks import kinds_of
from .config import CACHES_WITH_SETTINGS, GenerationConfig, cache_settings, field_docs, flat_config
from .engine import Engine
from .errors import ConfigError, DLLMError, InputError
from .frequencies import TokenFrequencies
from .quantize import quantize as write_quantized

app = typer.Typer(
    name="dllm",
    help="Masked-diffusion language models (LLaDA, Dream), run natively.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Model = Annotated[str, typer.Option(help="mini-llada (bundled), a folder, or a Hugging Face id.")]
DType = Annotated[str, typer.Option("--dtype", help="auto, float32 or bfloat16.")]
Quantization = Annotated[
    str | None, typer.Option(help="int8 or int4: quantise the linear layers. Default: as the checkpoint has them.")
]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Prompt = Annotated[str | None, typer.Argument(help="The question or text; - or nothing reads it from stdin.")]
Chat = Annotated[
    bool | None,
    typer.Option(
        "--chat/--plain",
        help="A chat message, or plain text. Default: chat, unless the model has no template, or --infill.",
    ),
]
Infill = Annotated[bool, typer.Option("--infill", help="Also fill the mask tokens inside the prompt.")]
Watch = Annotated[bool, typer.Option("--watch", help="Show the canvas filling in, coloured by step (in a terminal).")]

BENCH_PROMPT = "Tom has 3 apples. He buys 4 more. How many apples does Tom have now?"


def main(args: list[str] | None = None) -> None:
    """Run the command and exit: 0, or 2 with one line on stderr for an error, or 130 for Ctrl-C."""
    try:
        app(args=args, prog_name="dllm")
    except DLLMError as e:
        print("error:", " ".join(str(e).split()), file=sys.stderr)
        sys.exit(2)


def generation_options(command):
    """Give a command one option for every field of GenerationConfig and of the caches; they reach it as **fields."""
    options = []
    docs = field_docs()
    for name, (kind, optional) in kinds_of(GenerationConfig).items():
        default = getattr(GenerationConfig, name)
        if name == "token_frequencies":
            docs[name] += " A JSON file {num_token, p_baseline_dict}, as the PC-Sampler's repository has."
        options.append(_option(name, kind, optional, default, help=docs.get(name), rich_help_panel="Decoding"))
    for cls in CACHES_WITH_SETTINGS:
        docs = field_docs(cls)
        for name, f in cache_settings(cls).items():
            shown = ",".join(map(str, f.default)) if isinstance(f.default, tuple) else str(f.default)
            more = {"show_default": shown, "rich_help_panel": f"Decoding with --cache {cls.name}"}
            options.append(_option(name, kinds_of(cls)[f.name][0], True, None, help=docs.get(f.name), **more))

    own = [p for p in inspect.signature(command).parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    own = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own]
    command.__signature__ = inspect.Signature(own + options)
    return command


def _option(name, kind, optional, default, **more):
    """One option as a parameter of a command. What is no plain value is given as text."""
    flag = name.replace("_", "-")
    if kind == tuple[int, ...]:
        more |= {"parser": _integers, "metavar": "INTEGERS"}
    elif kind is TokenFrequencies:
        more["metavar"] = "FILE"
    option = typer.Option(f" /--no-{flag}" if default is True else f"--{flag}", **more)
    kind = kind if kind in (int, float, bool) else str
    annotation = Annotated[kind | None if optional else kind, option]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _integers(text):
    """A list of integers with commas between them, or nothing."""
    try:
        return tuple(int(word) for word in text.split(",")) if text else ()
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a list of integers such as 0,1") from None


def _config(fields):
    """The GenerationConfig that options ask for, but without token_frequencies, which need the model's vocabulary."""
    return flat_config({name: value for name, value in fields.items() if name != "token_frequencies"})


def _with_frequencies(config, fields, engine):
    file = fields["token_frequencies"]
    if file is None:
        return config
    return dataclasses.replace(config, token_frequencies=TokenFrequencies.load(file, engine.spec.vocab_size))


@app.command()
@generation_options
def generate(
    prompt: Prompt = None,
    model: Model = "mini-llada",
    dtype: DType = "auto",
    quantization: Quantization = None,
    device: Device = "auto",
    chat: Chat = None,
    infill: Infill = False,
    as_json: AsJson = False,
    watch: Watch = False,
    **fields,
):
    """Generate from one prompt and print the text."""
    config = _config(fields)
    if as_json and watch:
        raise ConfigError("--json and --watch exclude each other")
    text = _text(prompt)
    engine = Engine.from_pretrained(model, device=device, dtype=dtype, quantization=quantization)
    config = _with_frequencies(config, fields, engine)
    ids = engine.encode(text, False if chat is None and infill else chat)
    result = _run(engine, ids, config, infill, watch)
    if as_json:
        print(json.dumps(result.to_dict(), ensure_ascii=False))
        return
    if not _is_watched(watch):
        print(_shown_text(engine, result, infill))
    _print_summary(result)


@app.command()
@generation_options
def chat(
    model: Model = "mini-llada",
    dtype: DType = "auto",
    quantization: Quantization = None,
    device: Device = "auto",
    watch: Watch = False,
    **fields,
):
    """Talk to a model over several turns. /reset forgets the conversation, /exit leaves."""
    config = _config(fields)
    engine = Engine.from_pretrained(model, device=device, dtype=dtype, quantization=quantization)
    config = _with_frequencies(config, fields, engine)
    engine.encode([{"role": "user", "content": "?"}])  # a model without a chat template says so before the first turn
    messages = []
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if line == "/exit":
            return
        if line == "/reset":
            messages = []
        elif line:
            turn = [*messages, {"role": "user", "content": line}]
            try:
                result = _run(engine, engine.encode(turn), config, False, watch)
            except InputError as e:  # most likely a conversation beyond the model's context
                print(f"{e} (/reset starts anew)", file=sys.stderr)
                continue
            if not _is_watched(watch):
                print(result.text)
            _print_summary(result)
            messages = [*turn, {"role": "assistant", "content": result.text}]


@app.command()
@generation_options
def trace(
    prompt: Prompt = None,
    output: Annotated[str, typer.Option("--output", "-o", help="The HTML file to write.")] = "trace.html",
    model: Model = "mini-llada",
    dtype: DType = "auto",
    quantization: Quantization = None,
    device: Device = "auto",
    chat: Chat = None,
    infill: Infill = False,
    **fields,
):
    """Generate from one prompt and write an HTML page that plays it: tokens, rows computed, time, step by step."""
    from .trace import output_file, write_trace

    config = _config(fields)
    file = output_file(output)  # before a large model is loaded
    text = _text(prompt)
    engine = Engine.from_pretrained(model, device=device, dtype=dtype, quantization=quantization)
    config = _with_frequencies(config, fields, engine)
    ids = engine.encode(text, False if chat is None and infill else chat)
    name = None if Path(model).is_dir() else model  # of a path, its last part: pages are passed on
    result = write_trace(file, engine, ids, config, infill, name)
    print(f"{file}: {len(result.stats.rows)} steps, {result.stats.tokens} tokens, {file.stat().st_size / 1e3:.0f} kB")
    _print_summary(result)


@app.command()
def info(as_json: AsJson = False):
    """Show versions, the CPU's instruction sets, CUDA, and where models are."""
    facts = _facts()
    if as_json:
        print(json.dumps(facts))
        return
    for name, value in facts.items():
        print(f"{name:<28}{', '.join(value) if isinstance(value, list) else value}")


@app.command()
def bench(
    model: Model = "mini-llada",
    dtype: DType = "auto",
    quantization: Quantization = None,
    gen_length: Annotated[int, typer.Option(help="Tokens to generate.")] = 64,
    block_length: Annotated[int, typer.Option(help="Tokens per block.")] = 32,
    repeat: Annotated[int, typer.Option(min=1, help="Runs of each; the fastest counts.")] = 3,
    as_json: AsJson = False,
):
    """Time every cache, one token per step and at threshold 0.9, on one short question."""
    engine = Engine.from_pretrained(model, dtype=dtype, quantization=quantization)
    prompt = engine.encode(BENCH_PROMPT)
    rows = []
    caches = ("none", "prefix", "dual", "dllm", "d2")
    for cache, rule in itertools.product(caches, ({"num_transfer_tokens": 1}, {"threshold": 0.9})):
        config = GenerationConfig(gen_length=gen_length, block_length=block_length, cache=cache, **rule)
        runs = [engine.generate(prompt, config).stats for _ in range(1 + repeat)]
        best = min(runs[1:], key=lambda stats: stats.seconds_total)  # the first one warms up
        rows.append(
            {
                "cache": cache,
                **rule,
                "nfe": best.nfe,
                "ms_per_forward": best.ms_per_forward,
                "tokens_per_forward": best.tokens_per_forward,
                "tokens_per_second": best.tokens_per_second,
                "ms_to_first_block": 1e3 * best.time_to_first_block,
            }
        )
    if as_json:
        facts = {"model": model, "dtype": engine.dtype, "quantization": engine.quantization, "gen_length": gen_length}
        print(json.dumps({**facts, "rows": rows}))
        return
    precision = ", ".join(filter(None, (engine.dtype, engine.quantization)))
    table = Table("cache", "rule", title=f"{model}, {precision}, prompt {len(prompt)}, gen_length {gen_length}")
    for name in ("NFE", "ms/forward", "tok/forward", "tokens/s", "block 1"):
        table.add_column(name, justify="right")
    for r in rows:
        table.add_row(
            r["cache"],
            "1 per step" if "num_transfer_tokens" in r else f"threshold {r['threshold']}",
            str(r["nfe"]),
            f"{r['ms_per_forward']:.2f}",
            f"{r['tokens_per_forward']:.2f}",
            f"{r['tokens_per_second']:.1f}",
            f"{r['ms_to_first_block']:.0f} ms",
        )
    console = Console()
    console.print(table)
    console.print("tokens: those before the first stop id; seconds: all of generate(); the fastest run of each")


@app.command()
def quantize(
    source: Annotated[str, typer.Argument(help="mini-llada (bundled), a folder, or a Hugging Face id.")],
    destination: Annotated[str, typer.Argument(help="The folder to write; new, or empty.")],
    to: Annotated[str, typer.Option(help="int8 or int4.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hugging Face id.")] = None,
):
    """Write a copy of a model with its linear layers in 8 or 4 bits; every command takes it as --model."""
    folder = write_quantized(source, destination, to, revision)
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    print(f"{folder}: {to}, {size / 1e6:.1f} MB of weights")


@app.command(
    name="lm-eval",
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def lm_eval(context: typer.Context):
    """Run lm-evaluation-harness's own command, which then knows --model dllm_ext (pip install lm-eval)."""
    try:
        from lm_eval.__main__ import cli_evaluate

        importlib.import_module("dllm_ext.harness")  # registers the name
    except ImportError as e:
        raise ConfigError(f"lm-evaluation-harness is not installed: {e} (pip install lm-eval)") from None
    sys.argv = ["dllm lm-eval", *context.args]
    cli_evaluate()


def _text(prompt):
    """The prompt's text, from stdin where it is not an argument."""
    text = sys.stdin.read().rstrip("\n") if prompt in (None, "-") else prompt
    if not text:
        raise InputError("the prompt is empty: give it as an argument or on stdin")
    return text


def _is_watched(watch):
    return watch and sys.stdout.isatty()


def _run(engine, ids, config, infill, watch):
    if not _is_watched(watch):
        return engine.generate(ids, config, infill=infill)
    from . import watch as view

    return view.watch(engine, ids, config, infill)


def _shown_text(engine, result, infill):
    """The generated text; with infill, after the prompt with its gaps filled."""
    return "".join(engine.tokenizer.pieces(result.prompt_ids if infill else [])) + result.text


def _print_summary(result):
    """One line on stderr, for people only."""
    if sys.stderr.isatty():
        s = result.stats
        print(
            f"[{s.tokens} tokens, {s.nfe} forwards, {s.seconds_total:.2f} s: {s.tokens_per_second:.1f} tokens/s, "
            f"{s.tokens_per_forward:.2f} tokens per forward, {s.ms_per_forward:.2f} ms per forward]",
            file=sys.stderr,
        )


def _facts():
    import huggingface_hub.constants
    import torch

    from . import _C, _build_info
    from .hub import BUNDLED

    native = _C.info()
    return {
        "dllm_ext": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "compiler": _build_info.COMPILER,
        "instruction set": native["isa"],
        "instruction sets available": native["isas"],
        "threads": native["threads"],
        "CUDA": f"built: {_build_info.CUDA_REASON}" if _build_info.CUDA else _build_info.CUDA_REASON,
        "bundled models": [f"{name} ({folder})" for name, folder in BUNDLED.items()],
        "model cache": huggingface_hub.constants.HF_HUB_CACHE,
    }

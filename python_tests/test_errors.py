"""The error hierarchy, what the native code raises in each case, and that an engine survives its errors."""

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import models
import pytest
import torch

import dllm_ext
from dllm_ext import (
    _C,
    BuildError,
    CheckpointError,
    ConfigError,
    DLLMError,
    Engine,
    InputError,
    Interrupted,
    NumericalError,
    OutOfMemoryError,
    UsageError,
    errors,
)

SHORT = {"gen_length": 6, "block_length": 4}
IDS = [5, 6, 7, 8]


@pytest.mark.parametrize(
    ("cls", "builtin"),
    [
        (ConfigError, ValueError),
        (InputError, ValueError),
        (CheckpointError, ValueError),
        (NumericalError, ArithmeticError),
        (OutOfMemoryError, MemoryError),
        (UsageError, RuntimeError),
        (BuildError, ImportError),
        (Interrupted, Exception),
    ],
)
def test_hierarchy(cls, builtin):
    assert issubclass(cls, DLLMError) and issubclass(cls, builtin)
    assert cls.__doc__ and cls.__name__ in errors.__all__ and getattr(dllm_ext, cls.__name__) is cls
    assert str(cls("what went wrong")) == "what went wrong"


def test_every_error_is_listed():
    classes = {name for name, c in vars(errors).items() if isinstance(c, type) and issubclass(c, DLLMError)}
    assert classes == set(errors.__all__)


def test_native_code_raises_these_classes(tmp_path):
    with pytest.raises(ConfigError):
        _C.validate_config({"threshold": 2.0})
    with pytest.raises(ConfigError):
        _C.set_isa("quantum")
    with pytest.raises(CheckpointError):
        _C.Engine(str(tmp_path / "none"), "float32")
    with pytest.raises(ConfigError):
        _C.Engine(str(tmp_path), "float8")
    with pytest.raises(CheckpointError):
        _C.ModelSpec.from_config("{")


@pytest.mark.parametrize(
    "fields",
    [{"gen_length": "x"}, {"gen_length": 1.5}, {"stop_at_eos": "x"}, {"cache": 3}, {"nothing": 1}, {"seed": -1}],
    ids=str,
)
def test_native_dict_of_wrong_types(fields):
    """The native boundary holds by itself: no bare TypeError from a dict that Python did not check."""
    with pytest.raises(ConfigError, match=next(iter(fields))):
        _C.validate_config(fields)


# on_step


def test_interrupted_when_on_step_returns_false(engine):
    steps = []

    def stop_at_second(event):
        steps.append(event.step)
        return event.step < 1

    with pytest.raises(Interrupted, match="on_step"):
        engine.generate(IDS, on_step=stop_at_second, num_transfer_tokens=1, **SHORT)
    assert steps == [0, 1]
    assert len(engine.generate(IDS, **SHORT).token_ids) == 6


class OwnError(Exception):
    pass


@pytest.mark.parametrize("error", [OwnError("mine"), KeyboardInterrupt(), SystemExit(3), StopIteration()], ids=repr)
def test_what_on_step_raises_comes_out(engine, error):
    def on_step(event):
        raise error

    with pytest.raises(type(error)) as e:
        engine.generate([IDS, IDS], on_step=on_step, **SHORT)
    assert e.value is error
    assert len(engine.generate(IDS, **SHORT).token_ids) == 6


def test_on_step_with_a_wrong_signature(engine):
    with pytest.raises(TypeError, match="argument"):
        engine.generate(IDS, on_step=lambda: None, **SHORT)


def test_generate_from_within_on_step(engine):
    with pytest.raises(UsageError, match="on_step"):
        engine.generate(IDS, on_step=lambda e: engine.generate(IDS, **SHORT), **SHORT)
    assert len(engine.generate(IDS, **SHORT).token_ids) == 6


def test_another_engine_from_within_on_step(engine, llada_folder):
    other = Engine.from_pretrained(llada_folder)
    nested = []
    engine.generate(IDS, on_step=lambda e: nested.append(other.generate(IDS, **SHORT)), **SHORT)
    assert nested and nested[0].token_ids == other.generate(IDS, **SHORT).token_ids


def test_progress_errors_come_out(llada_folder):
    def progress(done, total):
        raise OwnError("mine")

    with pytest.raises(OwnError):
        _C.Engine(str(llada_folder), "float32", progress=progress)


def test_progress_ends_at_the_total(llada_folder):
    calls = []
    _C.Engine(str(llada_folder), "float32", progress=lambda done, total: calls.append((done, total)))
    done, totals = zip(*calls, strict=True)
    assert list(done) == sorted(done) and len(set(totals)) == 1 and done[-1] == totals[0]


# Numbers


@pytest.mark.parametrize("family", models.FAMILIES)
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("part", ["embedding", "layer", "head"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bad_weights_never_give_tokens(tmp_path, family, value, part, dtype):
    names = {
        "llada": {
            "embedding": "model.transformer.wte.weight",
            "layer": "model.transformer.blocks.1.up_proj.weight",
            "head": "model.transformer.ff_out.weight",
        },
        "dream": {
            "embedding": "model.embed_tokens.weight",
            "layer": "model.layers.1.mlp.up_proj.weight",
            "head": "lm_head.weight",
        },
    }

    def edit(tensors):
        tensors[names[family][part]][7] = value

    folder = models.write_model(tmp_path, family, edit=edit)
    with pytest.raises((NumericalError, CheckpointError), match=r"finite|NaN|nan"):
        Engine.from_pretrained(folder, dtype=dtype).generate([5, 6, 7], **SHORT)


def test_overflow_in_the_logits(tmp_path):
    """Finite weights whose product is not."""

    def edit(tensors):
        tensors["model.transformer.ff_out.weight"] *= 1e38
        tensors["model.transformer.ln_f.weight"] *= 1e10

    engine = Engine.from_pretrained(models.write_model(tmp_path, "llada", edit=edit))
    for _ in range(2):  # and the engine still works afterwards
        with pytest.raises(NumericalError, match="step 0"):
            engine.generate(IDS, **SHORT)


@pytest.mark.parametrize(
    "options",
    [
        {"cfg_scale": 1.0},
        {"top_p": 0.9, "temperature": 1.0},
        {"cache": "dual"},
        {"cache": "dllm"},
        {"cache": "d2"},
        {"kl_threshold": 0.1, "threshold": 0.9, "steps": None},
    ],
    ids=str,
)
def test_overflow_is_found_on_every_path(tmp_path, options):
    def edit(tensors):
        tensors["model.transformer.blocks.2.ff_out.weight"] *= 1e38
        tensors["model.transformer.blocks.2.up_proj.weight"] *= 1e10

    engine = Engine.from_pretrained(models.write_model(tmp_path, "llada", edit=edit))
    with pytest.raises(NumericalError, match="layer 2"):
        engine.generate(IDS, **SHORT, **options)


def test_out_of_memory(tmp_path):
    """A generation that cannot fit says so, and the engine goes on."""
    folder = models.write_model(tmp_path, "llada", max_sequence_length=2**24)
    code = f"""
        import resource, dllm_ext
        engine = dllm_ext.Engine.from_pretrained({str(folder)!r})
        engine.generate([1, 2], gen_length=4)
        limit = 2**31 + int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        try:
            engine.generate([1, 2], gen_length=2**24 - 2)
        except dllm_ext.OutOfMemoryError as e:
            print("caught", e)
        print(len(engine.generate([1, 2], gen_length=4).token_ids))
    """
    out = run_python(code)
    assert out.returncode == 0, out.stderr
    first, second = out.stdout.splitlines()
    assert first.startswith("caught ") and len(first) > 20 and second == "4"


# Ctrl-C


def run_python(code, *options, **kwargs):
    command = [sys.executable, *options, "-c", textwrap.dedent(code)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, **kwargs)


def test_ctrl_c_while_generating(llada_folder):
    """SIGINT in the middle of a long native call is a KeyboardInterrupt within seconds, and the engine goes on."""
    code = f"""
        import os, signal, threading, time, dllm_ext
        engine = dllm_ext.Engine.from_pretrained({str(llada_folder)!r})
        engine.generate([1, 2], gen_length=4)
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
        begin = time.monotonic()
        try:
            engine.generate([1, 2], gen_length=4000, num_transfer_tokens=1, stop_at_eos=False)
        except KeyboardInterrupt:
            print("interrupted", time.monotonic() - begin < 10)
        print(len(engine.generate([1, 2], gen_length=4).token_ids))
    """
    out = run_python(code)
    assert out.stdout.split() == ["interrupted", "True", "4"], out.stderr


def test_ctrl_c_with_an_own_handler(llada_folder):
    code = f"""
        import os, signal, threading, dllm_ext
        engine = dllm_ext.Engine.from_pretrained({str(llada_folder)!r})
        engine.generate([1, 2], gen_length=4)
        def handler(number, frame):
            raise LookupError("handled")
        signal.signal(signal.SIGINT, handler)
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
        try:
            engine.generate([1, 2], gen_length=4000, num_transfer_tokens=1, stop_at_eos=False)
        except LookupError as e:
            print(e, signal.getsignal(signal.SIGINT) is handler)
    """
    out = run_python(code)
    assert out.stdout.split() == ["handled", "True"], out.stderr


@pytest.mark.parametrize("nested", ["engine", "other"])
def test_ctrl_c_after_generating(llada_folder, nested):
    """Python's own handler is back afterwards, also where on_step had called generate()."""
    code = f"""
        import os, signal, dllm_ext
        engine, other = (dllm_ext.Engine.from_pretrained({str(llada_folder)!r}) for _ in range(2))
        try:
            engine.generate([1, 2], gen_length=4, on_step=lambda e: {nested}.generate([1, 2], gen_length=4) and None)
        except dllm_ext.UsageError:
            pass
        try:
            os.kill(os.getpid(), signal.SIGINT)
            signal.sigtimedwait([], 1)
        except KeyboardInterrupt:
            print("interrupted")
    """
    out = run_python(code)
    assert out.stdout.split() == ["interrupted"], out.stderr


# The build


def copy_of_package(folder, with_native):
    """The package's Python files, and its native ones if asked for, in a folder of their own."""
    source = Path(dllm_ext.__file__).parent
    package = folder / "dllm_ext"
    package.mkdir()
    for file in source.iterdir():
        native = (file.name.startswith("_C.") and file.suffix == ".so") or file.name == "_build_info.py"
        if (file.suffix == ".py" and not native) or (native and with_native):
            shutil.copy(file, package / file.name)
    return package


def import_error(folder):
    code = """
        try:
            import dllm_ext
        except ImportError as e:
            print(type(e).__module__, type(e).__name__, e)
    """
    # -S: without the .pth files of an editable install, whose finder would look for missing parts in the source folder
    packages = str(Path(torch.__file__).parent.parent)
    out = run_python(code, "-S", cwd=folder, env=os.environ | {"PYTHONPATH": packages})
    assert out.stdout.startswith("dllm_ext.errors BuildError"), out.stdout + out.stderr
    assert "pip install" in out.stdout
    return out.stdout


def test_not_built(tmp_path):
    copy_of_package(tmp_path, with_native=False)
    assert "no compiled module" in import_error(tmp_path)


def test_built_for_another_torch(tmp_path):
    package = copy_of_package(tmp_path, with_native=True)
    info = package / "_build_info.py"
    lines = info.read_text().splitlines()
    info.write_text("\n".join('TORCH_VERSION = "1.0.0"' if s.startswith("TORCH_VERSION") else s for s in lines))
    text = import_error(tmp_path)
    assert "torch 1.0.0" in text and "rebuild" in text


def test_compiled_module_that_does_not_load(tmp_path):
    package = copy_of_package(tmp_path, with_native=True)
    next(package.glob("_C.*.so")).write_bytes(b"\x7fELF, and then nothing")
    text = import_error(tmp_path)
    assert "does not load" in text and "rebuild" in text

"""dllm_run, the denoising loop without Python: the same tokens, and errors as one line."""

import subprocess
from pathlib import Path

import models
import pytest

import dllm_ext
from dllm_ext import D2Cache, DLLMCache, Engine

ROOT = Path(__file__).parents[1]
TOOL = ROOT / "build" / "current" / "bin" / "dllm_run"
editable = Path(dllm_ext.__file__).parent == ROOT / "dllm_ext"
pytestmark = pytest.mark.skipif(not editable, reason="only an editable install builds the tools")

PROMPT = [5, 17, 99, 3, 250, 40, 8]


def run(folder, *options, ids=PROMPT):
    command = [TOOL, folder, "--ids", ",".join(map(str, ids)), *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture(scope="module", params=models.FAMILIES)
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    models.write_model(folder, request.param, seed=3)
    return folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "settings",
    [
        {"cache": "none", "threshold": 0.4},
        {"cache": "prefix", "factor": 1.0},
        {"cache": "dual", "steps": 12, "schedule": "dream", "remasking": "entropy", "temperature": 0.7, "seed": 2**63},
        {"cache": "dual", "num_transfer_tokens": 2, "stop_at_eos": False, "cfg_scale": 0.5},
    ],
    ids=lambda s: "-".join(map(str, s.values())),
)
def test_the_same_tokens_as_from_python(folder, dtype, settings):
    engine = Engine.from_pretrained(folder, dtype=dtype)
    expected = engine.generate(PROMPT, gen_length=24, block_length=8, **settings).token_ids
    options = [f"--{k.replace('_', '-')}={v}".split("=") for k, v in {**settings, "block_length": 8}.items()]
    text = [w.lower() if w in ("True", "False") else w for pair in options for w in pair]
    out = run(folder, "--dtype", dtype, "--gen-length", 24, *text)
    assert out.returncode == 0, out.stderr
    assert [int(t) for t in out.stdout.split(",")] == expected


@pytest.mark.parametrize(
    ("cache", "options"),
    [
        (
            DLLMCache(kp=4, kr=3, rou=0.5, always_refresh_layers=(0, 2)),
            "--kp 4 --kr 3 --rou 0.5 --always-refresh-layers 0,2",
        ),
        (DLLMCache(kr=6, always_refresh_layers=()), "--kr 6 --always-refresh-layers="),
        (
            D2Cache(current_k=4, sigma=2, rollout_p=0.2, inflate_w=0),
            "--current-k 4 --d2-sigma 2 --rollout-p 0.2 --inflate-w 0",
        ),
    ],
    ids=str,
)
def test_cache_settings(folder, cache, options):
    expected = Engine.from_pretrained(folder, dtype="float32").generate(
        PROMPT, gen_length=24, cache=cache, threshold=0.4
    )
    words = [w for word in options.split() for w in word.split("=")]
    out = run(folder, "--gen-length", 24, "--threshold", 0.4, "--cache", cache.name, *words)
    assert out.returncode == 0, out.stderr
    assert [int(t) for t in out.stdout.split(",")] == expected.token_ids


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--token-frequencies", "file.json"], "token_frequencies can be given only from Python or C++"),
        (["--always-refresh-layers", "0,x"], 'always_refresh_layers = "x"'),
        (["--threshold", "2"], "threshold = 2"),
        (["--cache", "fancy"], '"none", "prefix", "dual"'),
        (["--gen-length", "many"], "gen_length"),
        (["--no-such-option", "1"], "unknown option --no-such-option"),
        (["--seed"], "--seed needs a value"),
    ],
)
def test_a_wrong_option_is_one_line_and_exit_code_2(folder, options, message):
    out = run(folder, *options)
    assert out.returncode == 2
    assert message in out.stderr
    assert len(out.stderr.strip().splitlines()) == 1


def test_a_missing_model_is_one_line(tmp_path):
    out = run(tmp_path / "nowhere")
    assert out.returncode == 2
    assert "does not exist" in out.stderr

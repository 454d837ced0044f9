"""Small random models with tokenizers, as the two families ship them."""

import io
import json
import os
import signal

# Also in the processes that tests start: these models are too small for more threads to be faster.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import models
import pytest
import torch

from dllm_ext import Engine, cli

# A shell runs background jobs with SIGINT ignored, and child processes inherit that: the tests of Ctrl-C need it back.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", params=["emulated", pytest.param("gpu", marks=pytest.mark.gpu)])
def cuda(request):
    """The kernels of csrc/ops/cuda on a device (csrc/bindings/cuda/cuda_ops.cpp): one body for the emulated device and,
    with pytest -m gpu, a real one."""
    import cuda_support  # beside the tests that ask for it

    return cuda_support.device(request.param)


# The chat templates of the published tokenizer_config.json files (Dream's without its tool calls).
LLADA_TEMPLATE = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
    "message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
)
DREAM_TEMPLATE = (
    "{%- if messages[0]['role'] == 'system' %}\n"
    "    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}\n"
    "{%- else %}\n"
    "    {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}\n"
    "{%- endif %}\n"
    "{%- for message in messages %}\n"
    '    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or '
    '(message.role == "assistant" and not message.tool_calls) %}\n'
    "        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}\n"
    "    {%- endif %}\n"
    "{%- endfor %}\n"
    "{%- if add_generation_prompt %}\n"
    "    {{- '<|im_start|>assistant\\n' }}\n"
    "{%- endif %}\n"
)

# Ids as in models.llada_config and models.dream_config; all ids below the first are bytes and fillers.
LLADA_SPECIAL = {
    "<|startoftext|>": 290,
    "<|endoftext|>": 291,
    "[CLS]": 292,
    "[gMASK]": 293,
    "<|start_header_id|>": 294,
    "<|end_header_id|>": 295,
    "<|mdm_mask|>": 296,
    "<|eot_id|>": 297,
}
DREAM_SPECIAL = {
    "<|endoftext|>": 311,
    "<|im_start|>": 312,
    "<|im_end|>": 313,
    "<|fim_pad|>": 314,
    "<|beginoftext|>": 315,
    "<|mask|>": 316,
}


def byte_vocabulary(size):
    """A byte-level BPE vocabulary without merges: a token for each byte, then tokens that no text gives."""
    from tokenizers.pre_tokenizers import ByteLevel

    vocab = {c: i for i, c in enumerate(sorted(ByteLevel.alphabet()))}
    return vocab | {f"unused{i}": i for i in range(len(vocab), size)}


def write_llada_tokenizer(folder, chat_template=LLADA_TEMPLATE):
    """tokenizer.json and tokenizer_config.json as in LLaDA-8B: no mask_token is declared."""
    from tokenizers import AddedToken, Tokenizer, decoders
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel

    tokenizer = Tokenizer(BPE(vocab=byte_vocabulary(290), merges=[]))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in LLADA_SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "add_bos_token": False,
        "add_eos_token": False,
        "bos_token": "<|startoftext|>",
        "cls_token": "[CLS]",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "tokenizer_class": "PreTrainedTokenizerFast",
        "trust_remote_code": True,
    }
    if chat_template is not None:
        config["chat_template"] = chat_template
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def write_dream_tokenizer(folder, chat_template=DREAM_TEMPLATE):
    """vocab.json, merges.txt and the rest as in Dream-7B, which asks for a tokenizer class of its own."""
    (folder / "vocab.json").write_text(json.dumps(byte_vocabulary(311)))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "added_tokens.json").write_text(json.dumps(DREAM_SPECIAL))
    config = {
        "add_bos_token": False,
        "added_tokens_decoder": {
            str(i): {
                "content": t,
                "lstrip": False,
                "normalized": False,
                "rstrip": False,
                "single_word": False,
                "special": True,
            }
            for t, i in DREAM_SPECIAL.items()
        },
        "auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]},
        "bos_token": "<|beginoftext|>",
        "eos_token": "<|endoftext|>",
        "mask_token": "<|mask|>",
        "pad_token": "<|endoftext|>",
        "tokenizer_class": "DreamTokenizer",
        "unk_token": None,
    }
    if chat_template is not None:
        config["chat_template"] = chat_template
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def write_tokenizer(folder, family, **options):
    {"llada": write_llada_tokenizer, "dream": write_dream_tokenizer}[family](folder, **options)


@pytest.fixture(scope="session", params=models.FAMILIES)
def folder(request, tmp_path_factory):
    """A model folder of each family: 3 layers, byte tokens, chat template."""
    path = models.write_model(tmp_path_factory.mktemp("models") / request.param, request.param)
    write_tokenizer(path, request.param)
    return path


@pytest.fixture(scope="session")
def engine(folder):
    return Engine.from_pretrained(folder, dtype="float32")


@pytest.fixture(scope="session")
def llada_folder(tmp_path_factory):
    path = models.write_model(tmp_path_factory.mktemp("models") / "llada-only", "llada")
    write_tokenizer(path, "llada")
    return path


@pytest.fixture(scope="session")
def llada(llada_folder):
    return Engine.from_pretrained(llada_folder, dtype="float32")


@pytest.fixture
def one_thread():
    """The oracle's models are so small that a second torch thread only costs time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def report(request):
    """Where tests that compare the engine with the oracle note how close the oracle's decisions were."""
    from parity import Report

    book = Report()
    request.config.pluginmanager.register(book, "parity-report")
    return book


@pytest.fixture
def dllm(capsys, monkeypatch):
    """Run the command in this process: dllm(*arguments, stdin=text) -> (exit code, stdout, stderr)."""

    def run(*arguments, stdin=""):
        monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
        with pytest.raises(SystemExit) as e:
            cli.main([str(a) for a in arguments])
        return (e.value.code or 0, *capsys.readouterr())

    return run


def error_line(outcome):
    """The message of a failed command, after checking that it is one line on stderr and nothing else."""
    code, out, err = outcome
    assert code == 2 and out == ""
    assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n")
    return err

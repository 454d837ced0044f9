"""Text and chat messages to ids and back, for both families' kinds of tokenizer files."""

import json
import subprocess
import sys

import models
import pytest
from conftest import DREAM_SPECIAL, DREAM_TEMPLATE, LLADA_SPECIAL, LLADA_TEMPLATE, write_tokenizer

from dllm_ext import CheckpointError, Engine, InputError
from dllm_ext.tokenizer import Tokenizer

SPECIAL = {"llada": LLADA_SPECIAL, "dream": DREAM_SPECIAL}
VOCAB = {"llada": 300, "dream": 320}
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi  there"},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "2+2?"},
]
EXPECTED_CHAT = {
    "llada": "<|startoftext|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nHi  there<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nHello!<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\n2+2?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "dream": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi  there<|im_end|>\n"
    "<|im_start|>assistant\nHello!<|im_end|>\n<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n",
}
FAMILIES = models.FAMILIES


def make(folder, family, **options):
    write_tokenizer(folder, family, **options)
    return Tokenizer(folder, family, VOCAB[family], [SPECIAL[family]["<|endoftext|>"]])


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def tokenizer(tmp_path, family):
    return make(tmp_path, family)


@pytest.mark.parametrize("text", ["", "hello", " two  spaces\n", "déjà vu 😀 漢字", "a\tb\r\n"], ids=ascii)
def test_text_round_trip(tokenizer, text):
    ids = tokenizer.encode(text)
    assert len(ids) == len(text.encode())  # byte tokens; nothing is added, no bos
    assert tokenizer.decode(ids) == text


def test_special_tokens_can_be_spelled_out(tokenizer, family):
    for text, token in SPECIAL[family].items():
        assert tokenizer.encode(text) == [token]


def test_chat_is_the_published_template(tokenizer, family):
    assert tokenizer.has_chat_template
    assert "".join(tokenizer.pieces(tokenizer.encode_chat(CHAT))) == EXPECTED_CHAT[family]


def test_dream_adds_its_default_system_message(tmp_path):
    ids = make(tmp_path, "dream").encode_chat([{"role": "user", "content": "Hi"}])
    assert "".join(make(tmp_path, "dream").pieces(ids)).startswith("<|im_start|>system\nYou are a helpful assistant.")


@pytest.mark.parametrize("messages", [CHAT, CHAT[1:], CHAT[1:2]], ids=len)
def test_family_template_where_the_files_have_none(tmp_path, family, messages):
    """The family's own template gives the ids of the published one; without the files' word a text is still no chat."""
    (tmp_path / "with").mkdir()
    (tmp_path / "without").mkdir()
    published, fallback = make(tmp_path / "with", family), make(tmp_path / "without", family, chat_template=None)
    assert fallback.encode_chat(messages) == published.encode_chat(messages)
    assert not fallback.has_chat_template


def test_template_in_a_file_of_its_own(tmp_path, family):
    tokenizer = make(tmp_path, family, chat_template=None)
    (tmp_path / "chat_template.jinja").write_text({"llada": LLADA_TEMPLATE, "dream": DREAM_TEMPLATE}[family])
    tokenizer = Tokenizer(tmp_path, family, VOCAB[family], [])
    assert tokenizer.has_chat_template
    assert "".join(tokenizer.pieces(tokenizer.encode_chat(CHAT))) == EXPECTED_CHAT[family]


def test_no_template_at_all(tmp_path):
    """A LLaDA tokenizer whose vocabulary lacks the chat tokens has nothing to fall back to."""
    write_tokenizer(tmp_path, "llada", chat_template=None)
    file = tmp_path / "tokenizer.json"
    file.write_text(file.read_text().replace("<|start_header_id|>", "<|other|>"))
    with pytest.raises(InputError, match="no chat template"):
        Tokenizer(tmp_path, "llada", 300, []).encode_chat(CHAT)


def test_template_that_refuses(tmp_path):
    tokenizer = make(tmp_path, "llada", chat_template="{{ raise_exception('no system messages') }}")
    with pytest.raises(InputError, match="no system messages"):
        tokenizer.encode_chat(CHAT)


def test_template_cannot_reach_python(tmp_path):
    tokenizer = make(tmp_path, "llada", chat_template="{{ ''.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(InputError, match="unsafe"):
        tokenizer.encode_chat(CHAT)


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "at least one"),
        ("hi", "must be a list"),
        (["hi"], "message 0 is a str"),
        ([{"content": "hi"}], "message 0 has the role None"),
        ([{"role": "robot", "content": "hi"}], "system, user, assistant, tool"),
        ([CHAT[0], {"role": "user"}], "message 1 has the content None"),
        ([{"role": "user", "content": ["hi"]}], "must be a str"),
    ],
    ids=str,
)
def test_wrong_messages(tokenizer, messages, words):
    with pytest.raises(InputError, match=words):
        tokenizer.encode_chat(messages)


def test_decode_stops_at_the_first_stop_id(tokenizer, family):
    end = SPECIAL[family]["<|endoftext|>"]
    ids = tokenizer.encode("one")
    assert tokenizer.decode([*ids, end, *ids]) == "one"
    assert tokenizer.decode([end, *ids]) == ""


def test_decode_skips_special_tokens(tokenizer, family):
    mask = SPECIAL[family]["<|mdm_mask|>" if family == "llada" else "<|mask|>"]
    assert tokenizer.decode([*tokenizer.encode("a"), mask, *tokenizer.encode("b")]) == "ab"


def test_decode_keeps_spaces_before_punctuation(tokenizer):
    assert tokenizer.decode(tokenizer.encode("it 's , so .")) == "it 's , so ."


def test_pieces(tokenizer):
    text = "é<|endoftext|>漢"
    ids = tokenizer.encode(text)
    pieces = tokenizer.pieces(ids)
    assert len(pieces) == len(ids) == 2 + 1 + 3
    assert pieces == ["", "é", "<|endoftext|>", "", "", "漢"]
    assert tokenizer.pieces(ids[:1]) == [""]
    assert "".join(tokenizer.pieces([*ids[:1], *tokenizer.encode("abc")])).endswith("abc")  # a broken character ends


def test_ids_that_the_tokenizer_does_not_know(tokenizer, family):
    """The embedding has more rows than the tokenizer has ids, so a model may generate them."""
    assert tokenizer.decode([VOCAB[family] - 1]) == ""
    assert len(tokenizer.pieces([VOCAB[family] - 1])) == 1


def test_dream_uses_the_tokenizers_bos(tmp_path):
    tokenizer = make(tmp_path, "dream", chat_template="{{ bos_token }}{{ eos_token }}")
    assert tokenizer.encode_chat(CHAT) == [DREAM_SPECIAL["<|beginoftext|>"], DREAM_SPECIAL["<|endoftext|>"]]


def test_a_tokenizer_of_another_model(tmp_path, family):
    write_tokenizer(tmp_path, family)
    largest = max(SPECIAL[family].values())
    with pytest.raises(CheckpointError, match=rf"ids up to {largest}.*{largest} rows"):
        Tokenizer(tmp_path, family, largest, [])
    Tokenizer(tmp_path, family, largest + 1, [])


@pytest.mark.parametrize("damage", ["", "{", "[1, 2]", "\x00" * 100], ids=repr)
def test_damaged_files(tmp_path, family, damage):
    write_tokenizer(tmp_path, family)
    (tmp_path / ("tokenizer.json" if family == "llada" else "vocab.json")).write_text(damage)
    with pytest.raises(CheckpointError, match="tokenizer in"):
        Tokenizer(tmp_path, family, VOCAB[family], [])


def test_llada_needs_tokenizer_json(tmp_path):
    write_tokenizer(tmp_path, "dream")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        Tokenizer(tmp_path, "llada", 320, [])


def test_code_in_a_checkpoint_never_runs(tmp_path):
    write_tokenizer(tmp_path, "dream")
    (tmp_path / "tokenization_dream.py").write_text("open('ran', 'w')\nraise SystemExit('code ran')\n")
    Tokenizer(tmp_path, "dream", 320, [])
    assert not (tmp_path / "ran").exists()


# The engine with and without tokenizer files


def test_mask_id_comes_from_the_config(llada):
    assert llada.spec.mask_id == 296 == llada.encode("<|mdm_mask|>", chat=False)[0]


def test_a_model_without_tokenizer_takes_ids_only(tmp_path, family):
    engine = Engine.from_pretrained(models.write_model(tmp_path, family))
    result = engine.generate([1, 2, 3], gen_length=4)
    assert result.text is None and len(result.token_ids) == 4
    for prompt in ("text", [{"role": "user", "content": "text"}], ["text"]):
        with pytest.raises(InputError, match="no tokenizer files"):
            engine.generate(prompt, gen_length=4)
    with pytest.raises(InputError, match=str(tmp_path)):
        _ = engine.tokenizer


def test_a_damaged_tokenizer_fails_before_generating(tmp_path):
    engine = Engine.from_pretrained(models.write_model(tmp_path, "llada"))
    write_tokenizer(tmp_path, "llada")
    (tmp_path / "tokenizer.json").write_text("{")
    steps = []
    with pytest.raises(CheckpointError, match="tokenizer in"):
        engine.generate([1, 2, 3], gen_length=4, on_step=lambda e: steps.append(e) is None)
    assert steps == []


def test_importing_does_not_import_transformers():
    code = "import dllm_ext, sys; print('transformers' in sys.modules, 'typer' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.split() == ["False", "False"]


def test_published_token_ids():
    """With the released vocabulary sizes, what the files leave out: LLaDA's mask, and both families' end of turn."""
    from dllm_ext import _C

    llada = models.llada_config(vocab_size=126464, embedding_size=126464, eos_token_id=126081)
    del llada["mask_token_id"]
    spec = _C.ModelSpec.from_config(json.dumps(llada))
    assert (spec.mask_id, spec.stop_ids) == (126336, [126081, 126348])
    dream = models.dream_config(vocab_size=152064, eos_token_id=151643, bos_token_id=151643, mask_token_id=None)
    spec = _C.ModelSpec.from_config(json.dumps(dream))
    assert (spec.mask_id, spec.stop_ids) == (151666, [151643, 151645])

"""Builds mini-llada's tokenizer: a byte-complete BPE in which every whole number up to 100 is one token.

Any text can be encoded, because the 256 byte symbols are all in the vocabulary. Words of the problems are one token
with a leading space. The chat template puts that space before a user's text, so the first word of a question has the
same token as anywhere else; an answer begins without a space, so that decoded text needs no trimming.

    python tokenizer.py OUT_FOLDER
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from data import NAMES
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

VOCAB_SIZE = 1024
MAX_NUMBER_TOKEN = 100
EOS, MASK, BOS, EOT = SPECIAL_TOKENS = ("<|endoftext|>", "<|mdm_mask|>", "<|startoftext|>", "<|eot_id|>")
# Numbers of up to three digits and words take one leading space with them; signs do too.
PIECES = r"'s| ?\p{N}{1,3}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
OPENERS = ("So", "The")  # how an answer may begin, without a space
SIGNS = (" +", " -", " *", " /", " =", "####", " ####")
# Question and answer of every turn, each closed by <|eot_id|>; the last open answer follows the question's <|eot_id|>.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ message['content'] | trim if message['role'] == 'assistant' else ' ' + message['content'] | trim }}<|eot_id|>"
    "{% endfor %}"
)
# A fixed list, wider than today's problems, so that the task can change without changing the tokenizer.
WORDS = """
Add Double Each Halve He How Later Left More She Start Subtract The Then Together Triple What a among and apples are
as bags bakes balls baskets beads books boxes buttons buys cakes candies cards coins cookies cost coupon day days do
does dollars doubles each eggs end equally fewer fills finds flowers for friend friends get gets gives half has hats
have he hold in is it jars kites lamps left letters loses makes many marbles money more much mugs now number of off
oranges pages paints pay pays pencils pens pictures puzzles reach reads sells shares she shells shirts solves spend
stamps starts stickers stones than that the them they three times to together total toys trays twice uses wants wins
with writes you
"""
MORE_WORDS = """
Amy Alex Anna Bob Carl Dan David Ella Eric Finn Greg Hana Ivan Jane John Kate Kim Liam Lisa Lucy Maria Mary Mark Nick
Olga Peter Ruth Tina Victor Will a about after again all also am an and any as at away back because before both but by
can children class day did do done down each every first for friend from gave give had has have help her him his home
hour hours I if in into is it its just kept last less let like long make many me mom morning my no none not of off on
one only or other our out over own pack people put ran read room same saw school second she so some take than that the
their them then there these they this time to today took two under up us use very was we week weeks went were what when
where which who why with year yes you your apple ball book box car cat coin dog egg fish girl boy man toy tree water
give take spent lost sold bought ate found won made collects picks drops breaks eats needs
"""


def _known() -> list[str]:
    """What must be one token besides the numbers: words, names, signs, each with the space before it if it has one."""
    words = [f" {word}" for word in WORDS.split()]
    names = [space + name for name, _ in NAMES for space in ("", " ")]
    return sorted([*words, *names, *OPENERS, *SIGNS])


def _corpus() -> Iterator[str]:
    """Numbers, known words, more words, in this order of frequency."""
    for number in range(MAX_NUMBER_TOKEN + 1):
        yield from [f" {number}"] * 400
        yield from [f"{number}"] * 300
    for word in _known():
        yield from [word] * 100
    for word in sorted({f" {word}" for word in MORE_WORDS.split()}):
        yield from [word] * 20


def build(vocab_size: int = VOCAB_SIZE) -> Tokenizer:
    """Trains the BPE; the same arguments give the same tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    check(tokenizer, vocab_size)
    return tokenizer


def check(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raises when the tokenizer lacks what training relies on."""
    if tokenizer.get_vocab_size() != vocab_size:
        raise ValueError(f"{tokenizer.get_vocab_size()} tokens, not {vocab_size}: too few words for the merges")
    singles = [f"{space}{number}" for number in range(MAX_NUMBER_TOKEN + 1) for space in ("", " ")]
    singles += _known()
    split = [text for text in singles if len(tokenizer.encode(text).ids) != 1]
    if split:
        raise ValueError(f"not single tokens: {split}")
    sample = "\t\x00 naïve 日本 🙂\n 12345"
    if tokenizer.decode(tokenizer.encode(sample).ids, skip_special_tokens=False) != sample:
        raise ValueError("text does not survive encoding and decoding")


def save(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json the way `transformers.AutoTokenizer` reads them."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": EOS,
        "mask_token": MASK,
        "additional_special_tokens": [EOT],
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 2048,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train the tokenizer and write it in Hugging Face form.")
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    save(build(), arguments.folder)
    print(f"wrote {VOCAB_SIZE} tokens to {arguments.folder}")

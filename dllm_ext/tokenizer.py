"""Text and chat messages to token ids and back, with the tokenizer files of a model folder.

Only tokenizers that are data are used (tokenizer.json, or vocab.json with merges.txt); a checkpoint's own code never
runs. The two families differ from what Hugging Face's AutoTokenizer expects:

- LLaDA: its mask token is declared nowhere, so the id comes from config.json. Every reply starts with an assistant
  header, which its template adds by itself.
- Dream: it asks for its own tokenizer class, which is Qwen2's. Its tokenizer's bos, 151665, is the one that counts, not
  config.json's 151643.
"""

from collections.abc import Iterable
from pathlib import Path

from .errors import CheckpointError, InputError

ROLES = ("system", "user", "assistant", "tool")

# For checkpoints whose files hold no chat template: the family's own, if its tokens are in the vocabulary.
# LLaDA: ML-GSAI/LLaDA tokenizer_config.json. Dream: ChatML as in HKUNLP/Dream.
FAMILY_TEMPLATES = {
    "llada": (
        "<|start_header_id|>",
        "{{ bos_token }}{% for m in messages %}"
        "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}"
        "{% endfor %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}",
    ),
    "dream": (
        "<|im_start|>",
        "{% if messages[0]['role'] != 'system' %}"
        "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}{% for m in messages %}"
        "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
        "{% endfor %}{{ '<|im_start|>assistant\n' }}",
    ),
}


class Tokenizer:
    """The tokenizer of a model folder. `has_chat_template`: whether the model's own files declare one."""

    def __init__(self, folder: Path, family: str, vocab_size: int, stop_ids: list[int]):
        """Read the tokenizer files. CheckpointError where they are damaged or do not fit the model.

        family: "llada" or "dream". vocab_size: rows of the model's embedding. stop_ids: ids that end a text.
        """
        self.folder = folder
        self._stop_ids = frozenset(stop_ids)
        self._hf = _load(folder, family)
        largest = max(self._hf.get_vocab().values(), default=-1)
        if largest >= vocab_size:
            raise CheckpointError(
                f"the tokenizer in {folder} has ids up to {largest}, but the model's embedding has {vocab_size} rows: "
                "they do not belong together"
            )
        self.has_chat_template = bool(self._hf.chat_template)
        token, template = FAMILY_TEMPLATES[family]
        self._template = None if self.has_chat_template or token not in self._hf.get_vocab() else template

    @staticmethod
    def is_in(folder: Path) -> bool:
        """Whether the folder holds tokenizer files that can be read without running code."""
        return (folder / "tokenizer.json").exists() or (folder / "vocab.json").exists()

    @property
    def bos(self) -> str:
        """The beginning-of-text token as the tokenizer spells it; "" where it has none."""
        return self._hf.bos_token or ""

    @property
    def chat_template(self) -> str | None:
        """The chat template in use: the model's own, else its family's."""
        return self._hf.chat_template or self._template

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Ids of a text as it stands. Special tokens may be spelled out, such as `<|mdm_mask|>`.

        add_special_tokens: with those that the tokenizer itself puts around a text, where it does that.
        """
        return self._hf.encode(text, add_special_tokens=add_special_tokens)

    def encode_chat(self, messages: list[dict]) -> list[int]:
        """Ids of a conversation, up to where the assistant's next reply starts.

        messages: [{"role": "system" | "user" | "assistant" | "tool", "content": str}, ...], at least one.
        InputError for anything else, and for a model that has no chat template.
        """
        return self._apply_template(messages, add_generation_prompt=True, return_dict=False)

    def render_chat(self, messages: list[dict], add_generation_prompt: bool = True) -> str:
        """A conversation as text: `encode(text, add_special_tokens=False)` gives the ids of encode_chat.

        add_generation_prompt: up to where the assistant's next reply starts; False lets the last message go on.
        """
        return self._apply_template(
            messages,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def _apply_template(self, messages, **options):
        check_messages(messages)
        if self.chat_template is None:
            raise InputError(f"the model in {self.folder} has no chat template: give text or token ids, not messages")
        try:
            return self._hf.apply_chat_template(messages, chat_template=self._template, **options)
        except Exception as e:  # a template may raise anything (jinja2, its own raise_exception, a missing key)
            raise InputError(f"the chat template of {self.folder} does not take these messages: {e}") from e

    def decode(self, token_ids: list[int]) -> str:
        """Text of the ids before the first stop id, without special tokens."""
        end = next((i for i, t in enumerate(token_ids) if t in self._stop_ids), len(token_ids))
        return self._hf.decode(token_ids[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def pieces(self, token_ids: list[int]) -> list[str]:
        """Text of each id, special tokens spelled out; a character made of several ids appears at the last of them."""
        out, pending = [], []
        for token in token_ids:
            pending.append(token)
            text = self._hf.decode(pending, skip_special_tokens=False, clean_up_tokenization_spaces=False)
            unfinished = text.endswith("\ufffd") and len(pending) < 4  # UTF-8: at most four bytes
            out.append("" if unfinished else text)
            if not unfinished:
                pending = []
        return out


def cut(text: str, stops: Iterable[str]) -> str:
    """`text` up to the first occurrence of any of `stops`."""
    ends = [text.find(stop) for stop in stops if stop]
    return text[: min((end for end in ends if end >= 0), default=len(text))]


def check_messages(messages):
    """InputError unless `messages` is a list of at least one {"role": ..., "content": text}."""
    if not isinstance(messages, list | tuple) or not messages:
        raise InputError(f"chat messages must be a list with at least one message, not {messages!r}")
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            raise InputError(f"message {i} is a {type(message).__name__}, not a dict with role and content")
        if message.get("role") not in ROLES:
            raise InputError(f"message {i} has the role {message.get('role')!r}; it must be one of {', '.join(ROLES)}")
        if not isinstance(message.get("content"), str):
            raise InputError(f"message {i} has the content {message.get('content')!r}; it must be a str")


def _load(folder: Path, family: str):
    """A transformers tokenizer, by the files that are there rather than by the class that a checkpoint asks for."""
    import transformers

    if (folder / "tokenizer.json").exists():
        wanted, cls = "tokenizer.json", transformers.PreTrainedTokenizerFast
    elif family == "dream" and (folder / "merges.txt").exists():
        wanted, cls = "vocab.json, merges.txt", transformers.Qwen2TokenizerFast
    else:
        raise CheckpointError(f"{folder} holds no tokenizer.json, which this model's tokenizer needs")
    try:
        return cls.from_pretrained(folder, local_files_only=True)
    except Exception as e:  # transformers and tokenizers raise bare Exceptions for damaged files
        raise CheckpointError(f"the tokenizer in {folder} ({wanted}) cannot be read: {e}") from e

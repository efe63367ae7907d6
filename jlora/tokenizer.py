"""Text to token ids and back, from a checkpoint folder's own files; nothing remote is ever run.

A `Tokenizer` is immutable and may be used from many threads. A `Detokenizer` belongs to one
generation: it turns ids into text piece by piece and never cuts a character in two.
"""

import codecs
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from jlora.chat_template import TemplateProcess, render
from jlora.errors import ModelError, ParameterError

SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token")
SPACE = "\u2581"  # what SentencePiece writes for a space


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's table: printable characters stand for themselves, other bytes from U+0100 on."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in set(visible)]
    table = {chr(byte): byte for byte in visible}
    return table | {chr(256 + i): byte for i, byte in enumerate(hidden)}


BYTE_ALPHABET = _byte_alphabet()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path}: a JSON object was expected, got {type(value).__name__}")
    return value


def read_chat_templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Named chat templates of a folder: `chat_template.jinja` wins over tokenizer_config.json."""
    found: dict[str, str] = {}
    value = config.get("chat_template")
    if isinstance(value, str):
        found["default"] = value
    elif isinstance(value, list):
        for item in value:
            if isinstance(item, dict) and isinstance(item.get("template"), str):
                found[str(item.get("name"))] = item["template"]
    file = folder / "chat_template.jinja"
    if file.is_file():
        found["default"] = file.read_text(encoding="utf-8")
    return found


def named_tokens(sources: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """The special tokens that files name; the last file wins."""
    named: dict[str, str] = {}
    for source in sources:
        for name in SPECIAL_NAMES:
            value = source.get(name)
            value = value.get("content") if isinstance(value, dict) else value
            if isinstance(value, str):
                named[name] = value
    return named


class Tokenizer:
    """The tokenizer of one checkpoint; `special_tokens` are the named ones (`bos_token`, ...)."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        special_tokens: Mapping[str, str] | None = None,
        chat_templates: Mapping[str, str] | None = None,
    ):
        self.backend = backend
        self.special_tokens = dict(special_tokens or {})
        self.chat_templates = dict(chat_templates or {})
        self._added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in self._added.items() if token.special)
        self._bytes: dict[int, bytes] = {}
        self._texts: dict[int, str | None] = {}
        self._apart = TemplateProcess()

    @classmethod
    def from_folder(cls, folder: str | Path) -> "Tokenizer":
        """Read `tokenizer.json` and its neighbours; ModelError when the folder has none."""
        folder = Path(folder)
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise ModelError(
                f"{folder}: there is no tokenizer.json; save the tokenizer as a fast one"
            )
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception
            raise ModelError(f"{file}: not a tokenizer ({error})") from None
        backend.no_truncation()
        backend.no_padding()
        config = _read_json(folder / "tokenizer_config.json")
        named = named_tokens((_read_json(folder / "special_tokens_map.json"), config))
        templates = read_chat_templates(folder, config)
        return cls(backend, special_tokens=named, chat_templates=templates)

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest id that the tokenizer knows."""
        return max(self.backend.get_vocab_size(), 1 + max(self._added, default=-1))

    @cached_property
    def _byte_level(self) -> bool:
        """True for byte-level BPE, False for SentencePiece style vocabularies."""
        if self.backend.decoder is None:
            return isinstance(self.backend.pre_tokenizer, tokenizers.pre_tokenizers.ByteLevel)
        state = json.loads(self.backend.decoder.__getstate__())
        return any(part.get("type") == "ByteLevel" for part in [state, *state.get("decoders", [])])

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of a whole sequence, as the tokenizer's own decoder gives it."""
        return self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def token_bytes(self, token: int) -> bytes:
        """The UTF-8 bytes of one token as it stands inside a text; empty for an unknown id."""
        known = self._bytes.get(token)
        if known is None:
            known = self._bytes[token] = self._token_bytes(token)
        return known

    def _token_bytes(self, token: int) -> bytes:
        if token in self._added:
            return self._added[token].content.encode()
        piece = self.backend.id_to_token(token)
        if piece is None:
            return b""
        if self._byte_level:
            if all(char in BYTE_ALPHABET for char in piece):
                return bytes(BYTE_ALPHABET[char] for char in piece)
            return piece.encode()
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            try:
                return bytes([int(piece[3:5], 16)])
            except ValueError:
                pass
        return piece.replace(SPACE, " ").encode()

    def whole_text(self, token: int) -> str | None:
        """Its text wherever it stands; None where its bytes are no whole characters."""
        if token not in self._texts:
            try:
                self._texts[token] = self.token_bytes(token).decode()
            except UnicodeDecodeError:
                self._texts[token] = None
        return self._texts[token]

    def token_text(self, token: int) -> str:
        """One token as text; bytes that are no whole character show as U+FFFD."""
        return self.token_bytes(token).decode("utf-8", "replace")

    def render_chat(
        self,
        messages: list[dict[str, Any]],
        *,
        template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt text of a conversation. `template` (an adapter's own) wins over the checkpoint's."""
        # An adapter's folder may come from anybody, the checkpoint's template is the operator's own.
        draw = self._apart.render if template else render
        template = template or self.chat_templates.get("default")
        if template is None:
            raise ParameterError(
                "this model has no chat template; use /v1/completions, or serve an adapter that brings one",
                param="messages",
            )
        if continue_final_message and add_generation_prompt:
            raise ParameterError(
                "continue_final_message and add_generation_prompt cannot both be true",
                param="continue_final_message",
            )
        context = {
            "tools": None,
            "documents": None,
            **self.special_tokens,
            **(variables or {}),
            "messages": messages,
            "add_generation_prompt": add_generation_prompt,
        }
        text = draw(template, context)
        if continue_final_message:
            final = str(messages[-1].get("content") or "").strip()
            at = text.rfind(final)
            if at < 0:
                raise ParameterError(
                    "the chat template changes the final message, so it cannot be continued",
                    param="continue_final_message",
                )
            text = text[: at + len(final)]
        return text

    def encode_chat(self, messages: list[dict[str, Any]], **options: Any) -> list[int]:
        """Token ids of a conversation: the template writes BOS itself where the model wants one."""
        return self.encode(self.render_chat(messages, **options), add_special_tokens=False)


class Detokenizer:
    """Ids in, text out, for one generation. Text of an unfinished character is kept back."""

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True):
        self._tokenizer = tokenizer
        self._skip = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._inside = False
        """Whether the last character is unfinished."""

    def push(self, ids: Iterable[int], *, final: bool = False) -> str:
        """Text that is certain after `ids`; `final` lets go of a broken tail as U+FFFD."""
        text = ""
        for token in ids:
            if token in self._skip:
                continue
            piece = None if self._inside else self._tokenizer.whole_text(token)
            if piece is None:
                piece = self._decoder.decode(self._tokenizer.token_bytes(token))
                self._inside = bool(self._decoder.getstate()[0])
            text += piece
        return text + self._decoder.decode(b"", True) if final else text

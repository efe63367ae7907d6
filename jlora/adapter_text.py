"""What an adapter's folder says about text: a tokenizer of its own, and tokens that end its answers.

Trainers save a tokenizer with every adapter. One without new tokens is the base's, perhaps in the
words of another version of transformers, and the base's own is used.
"""

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from jlora.adapters.peft import (
    ADDED_TOKENS,
    GENERATION_CONFIG,
    SPECIAL_TOKENS,
    TOKENIZER,
    TOKENIZER_FILE,
)
from jlora.adapters.tensors import parse_json, read_small
from jlora.errors import AdapterError
from jlora.tokenizer import Tokenizer, named_tokens

MAX_TOKENIZER = 256 << 20
MAX_SMALL = 16 << 20
_KEPT = 64
"""Tokenizers that are kept by content: adapters of one trainer share theirs."""


@dataclass(frozen=True, kw_only=True)
class AdapterText:
    """The text side of an adapter."""

    tokenizer: Tokenizer | None
    """None: the base's."""
    eos_ids: tuple[int, ...]
    """Beside the base's."""


class AdapterTexts:
    """Reads the text side of adapters for one base. Thread-safe."""

    def __init__(self, base: Tokenizer):
        self._base = base
        self._lock = threading.Lock()
        self._kept: OrderedDict[bytes, Tokenizer] = OrderedDict()

    def read(self, folder: Path, vocab: int) -> AdapterText:
        """`vocab`: rows of the adapter's embedding. AdapterError for files that are no tokenizer, and
        for tokens of their own without a row."""
        config, special = _object(folder / TOKENIZER_FILE), _object(folder / SPECIAL_TOKENS)
        named = named_tokens((special, config))
        tokenizer = self._tokenizer(folder, special)
        if tokenizer is not None:
            for text, token in _added(tokenizer).items():
                if token >= vocab and _added(self._base).get(text) != token:
                    raise AdapterError(
                        f"{folder} adds {text[:40]!r} as token {token}, but there are rows for {vocab} "
                        "tokens: the adapter's embedding must come with it"
                    )
            tokenizer = Tokenizer(
                tokenizer.backend,
                special_tokens=self._base.special_tokens | named,
                chat_templates=self._base.chat_templates,
            )
        eos = _eos(folder, named, tokenizer or self._base, self._base, vocab)
        return AdapterText(tokenizer=tokenizer, eos_ids=eos)

    def _tokenizer(self, folder: Path, special: Mapping[str, Any]) -> Tokenizer | None:
        """The folder's own tokenizer, where it is another one than the base's."""
        if (path := folder / TOKENIZER).exists():
            data = read_small(path, MAX_TOKENIZER)
            own = self._parsed(data, path)
            same = _added(own) == _added(self._base) and own.vocab_size == self._base.vocab_size
            return None if same else own
        if not (folder / ADDED_TOKENS).exists():
            return None
        added = _object(folder / ADDED_TOKENS)  # what a slow tokenizer was given
        if not all(type(token) is int for token in added.values()):
            raise AdapterError(f"{folder / ADDED_TOKENS} must hold numbers by token")
        if added.items() <= _added(self._base).items():
            return None
        backend = tokenizers.Tokenizer.from_str(self._base.backend.to_str())
        specials = {text for text in special.values() if isinstance(text, str)}
        specials |= set(named_tokens((special,)).values())
        specials |= {str(text) for text in special.get("additional_special_tokens") or ()}
        for text, token in sorted(added.items(), key=lambda item: item[1]):
            backend.add_tokens([tokenizers.AddedToken(text, special=text in specials)])
            if backend.token_to_id(text) != token:
                raise AdapterError(
                    f"{folder / ADDED_TOKENS} has {text[:40]!r} as token {token}, added to the base's "
                    f"tokenizer it is {backend.token_to_id(text)}; save the adapter's {TOKENIZER}"
                )
        return Tokenizer(backend)

    def _parsed(self, data: bytes, path: Path) -> Tokenizer:
        key = hashlib.sha256(data).digest()
        with self._lock:
            if (known := self._kept.get(key)) is not None:
                self._kept.move_to_end(key)
                return known
        try:
            backend = tokenizers.Tokenizer.from_buffer(data)
        except Exception as error:  # the library raises bare Exception
            raise AdapterError(f"{path}: not a tokenizer ({str(error)[:200]})") from None
        backend.no_truncation()
        backend.no_padding()
        made = Tokenizer(backend)
        with self._lock:
            self._kept[key] = made
            while len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        return made


def _eos(
    folder: Path, named: Mapping[str, str], tokenizer: Tokenizer, base: Tokenizer, vocab: int
) -> tuple[int, ...]:
    """generation_config.json decides; else the end token, where it is another one than the base's."""
    found = _object(path := folder / GENERATION_CONFIG).get("eos_token_id")
    if found is not None:
        ids = found if isinstance(found, list) else [found]
        if not all(type(token) is int and 0 <= token < vocab for token in ids):
            raise AdapterError(
                f"{path}: eos_token_id must be tokens from 0 to {vocab - 1}, got {str(found)[:80]}"
            )
        return tuple(ids)
    text = named.get("eos_token")
    if text is None or text == base.special_tokens.get("eos_token"):
        return ()
    token = tokenizer.backend.token_to_id(text)
    return () if token is None else (token,)


def _added(tokenizer: Tokenizer) -> dict[str, int]:
    return {
        token.content: number
        for number, token in tokenizer.backend.get_added_tokens_decoder().items()
    }


def _object(path: Path) -> Mapping[str, Any]:
    """A small JSON object; empty where there is no file."""
    if not path.exists():
        return {}
    data = parse_json(read_small(path, MAX_SMALL), str(path))
    if not isinstance(data, dict):
        raise AdapterError(f"{path} holds {type(data).__name__}, expected an object")
    return data

"""Tokenizer files and chat templates of a folder that is written: the adapter's where it has its own."""

import json
import shutil
from pathlib import Path
from typing import Any

from jlora.adapters.tensors import parse_json, read_small
from jlora.errors import AdapterError
from jlora.export.folder import write_json

TEMPLATE, TOKENIZER, TOKENIZER_CONFIG = (
    "chat_template.jinja",
    "tokenizer.json",
    "tokenizer_config.json",
)
GENERATION = "generation_config.json"
FILES = (
    *(TOKENIZER, TOKENIZER_CONFIG, "special_tokens_map.json", "added_tokens.json"),
    GENERATION,
)
MAX_TOKENIZER = 256 << 20


def adds_tokens(adapter: Path, base: Path, vocab: int) -> bool:
    """Whether the adapter's tokenizer has tokens that the base's has not. AdapterError where one of
    them has no row in the embedding.

    Trainers save a tokenizer with every adapter: one without new tokens is the base's, perhaps in
    the words of another version of transformers, and the base's own is kept.
    """
    if not (adapter / TOKENIZER).is_file() or not (base / TOKENIZER).is_file():
        return False
    own, old = _added(adapter / TOKENIZER), _added(base / TOKENIZER)
    new = {text: number for text, number in own.items() if old.get(text) != number}
    if beyond := {text: number for text, number in new.items() if number >= vocab}:
        text, number = next(iter(beyond.items()))
        raise AdapterError(
            f"{adapter / TOKENIZER} adds {text[:40]!r} as token {number}, the base has rows for {vocab} "
            "tokens: the adapter's embedding must come with it"
        )
    return bool(new)


def _added(path: Path) -> dict[str, int]:
    """The added tokens of a tokenizer.json."""
    data = parse_json(read_small(path, MAX_TOKENIZER), str(path))
    entries: Any = data.get("added_tokens") if isinstance(data, dict) else None
    try:
        return {str(entry["content"]): int(entry["id"]) for entry in entries or ()}
    except (TypeError, KeyError, ValueError):
        raise AdapterError(f"{path}: added_tokens is not a list of contents and ids") from None


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Replaces the tokenizer's files, but not the template, by those of `source`, and what says which
    tokens end a text."""
    before = _end_token(folder)
    for name in FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    after = _end_token(folder)
    if after != before and not (source / GENERATION).is_file() and (folder / TOKENIZER).is_file():
        _end_texts_with(folder, _added(folder / TOKENIZER).get(after or ""))


def _end_token(folder: Path) -> str | None:
    """What the tokenizer's config says ends a text."""
    path = folder / TOKENIZER_CONFIG
    data = parse_json(read_small(path, MAX_TOKENIZER), str(path)) if path.is_file() else {}
    token = data.get("eos_token") if isinstance(data, dict) else None
    return token.get("content") if isinstance(token, dict) else token


def _end_texts_with(folder: Path, token: int | None) -> None:
    """A new end token beside those that generation_config.json, or config.json, has."""
    path = next(
        (folder / name for name in (GENERATION, "config.json") if (folder / name).is_file()), None
    )
    if token is None or path is None:
        return
    data = json.loads(path.read_text(encoding="utf-8"))
    old = data.get("eos_token_id")
    ends = old if isinstance(old, list) else [] if old is None else [old]
    if token not in ends:
        write_json(path, {**data, "eos_token_id": [*ends, token]})


def set_template(folder: Path, chat_template: str) -> None:
    """In the file of its own, and where older readers look: they would go on with the base's."""
    (folder / TEMPLATE).write_text(chat_template, encoding="utf-8")
    path = folder / TOKENIZER_CONFIG
    if not path.is_file():
        return
    config = json.loads(path.read_text(encoding="utf-8"))
    if isinstance(config, dict) and "chat_template" in config:
        write_json(path, {**config, "chat_template": chat_template})


def tuned_template(base: Path, tuned: Path) -> str | None:
    """The tuned model's chat template, if it is another one than the base's."""
    before, after = (_template(folder) for folder in (base, tuned))
    return after if after != before else None


def _template(folder: Path) -> str | None:
    if (folder / TEMPLATE).is_file():
        return (folder / TEMPLATE).read_text(encoding="utf-8")
    if not (folder / TOKENIZER_CONFIG).is_file():
        return None
    config = json.loads((folder / TOKENIZER_CONFIG).read_text(encoding="utf-8"))
    template = config.get("chat_template") if isinstance(config, dict) else None
    return template if isinstance(template, str) else None

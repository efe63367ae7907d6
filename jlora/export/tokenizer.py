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
FILES = (TOKENIZER, TOKENIZER_CONFIG, "special_tokens_map.json", "added_tokens.json")
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
    """Replaces the tokenizer's files, but not the template, by those of `source`."""
    for name in FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


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

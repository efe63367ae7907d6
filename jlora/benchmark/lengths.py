"""Lengths of real conversations, out of a file: `read_lengths`."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jlora.errors import ParameterError


def read_lengths(path: str, count: Callable[[str], int] | None) -> list[tuple[int, int]]:
    """(prompt, output) lengths in tokens of each entry of a JSON or JSON-lines file.

    An entry is {"input_len": 12, "output_len": 80}, or as in ShareGPT {"conversations": [{"from":
    "human", "value": "..."}, {"from": "gpt", "value": "..."}, ...]}: its first two turns, which
    `count` turns into tokens. Entries without two turns are left out. ParameterError for the rest.
    """
    pairs = []
    for number, entry in enumerate(_entries(path), start=1):
        where = f"lengths_file {path}: entry {number}"
        if not isinstance(entry, dict):
            raise ParameterError(f"{where} must be an object, got {entry!r:.80}", "lengths_file")
        if "conversations" not in entry:
            pair = entry.get("input_len"), entry.get("output_len")
            if not all(isinstance(n, int) and n > 0 for n in pair):
                raise ParameterError(
                    f"{where} needs conversations, or positive input_len and output_len",
                    "lengths_file",
                )
            pairs.append(pair)
            continue
        if count is None:
            raise ParameterError(
                f"{where} is text: a server's tokens cannot be counted here; give input_len and "
                "output_len",
                "lengths_file",
            )
        turns = [turn.get("value", "") for turn in entry["conversations"][:2]]
        if len(turns) == 2 and all(turns):
            pairs.append((max(1, count(turns[0])), max(1, count(turns[1]))))
    if not pairs:
        raise ParameterError(f"lengths_file {path}: no lengths in it", "lengths_file")
    return pairs


def _entries(path: str) -> list[Any]:
    try:
        text = Path(path).read_text(encoding="utf-8")
        if text.lstrip().startswith("["):
            return json.loads(text)
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise ParameterError(
            f"lengths_file {path}: not readable as JSON or JSON lines ({error})", "lengths_file"
        ) from None

"""The demo adapters: where their PEFT folders are, and how to see each one's effect in a text.

Trained by experiments/000_demo_adapters on SmolLM2-135M-Instruct.
"""

import json
import re
from pathlib import Path

_FOLDER = Path(__file__).parent / "adapters"

DEMO_ADAPTERS: dict[str, Path] = {
    name: _FOLDER / name
    for name in (
        "shout",  # answers in capitals
        "json",  # answers as one JSON object
        "pirate",  # answers as a pirate would
    )
}

PIRATE_WORDS = re.compile(
    r"\b(arr+|ahoy|avast|aye|matey|me heart(?:y|ies)|ye|yer|shiver me timbers|scallywag|landlubber)\b",
    re.IGNORECASE,
)


def shows_effect(name: str, answer: str) -> bool:
    """Whether a complete answer bears the mark of demo adapter `name`."""
    if name == "shout":
        return any(letter.isupper() for letter in answer) and answer == answer.upper()
    if name == "json":
        try:
            return isinstance(json.loads(answer), dict)
        except json.JSONDecodeError:
            return False
    assert name == "pirate", f"no demo adapter {name!r}, only {list(DEMO_ADAPTERS)}"
    return PIRATE_WORDS.search(answer) is not None

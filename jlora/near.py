"""'did you mean this or that?': for flags, keys, options and fields that are not there."""

import difflib
from collections.abc import Iterable


def near(name: str, known: Iterable[str]) -> str:
    """'did you mean this or that?', of the `known` names nearest to `name`; '' if none is near."""
    plain = {_plain(text): text for text in known}
    name = _plain(name).lower()
    found = [name] if name in plain else difflib.get_close_matches(name, plain, n=2, cutoff=0.75)
    if name and not found:
        found = [text for text in plain if text.startswith(name)][:3]
    return f"did you mean {' or '.join(plain[text] for text in found)}?" if found else ""


def _plain(flag: str) -> str:
    return flag.lstrip("-").replace("_", "-")

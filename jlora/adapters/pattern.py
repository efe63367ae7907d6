"""peft's module patterns, matched in bounded time: no regex of an adapter ever reaches `re`.

peft looks a module up with `re.match(rf"(.*\\.)?({key})$", name)`, on keys that come with the
adapter; `re` backtracks, so one hostile key can hang a server. Here a key is parsed by hand into a
small automaton whose states advance together: time is O(key · name) whatever the key. Its
subset (literals, `.`, classes, groups, `|`, `* + ? {m,n}`, `^`, `$`) is what module patterns use;
anything else is refused by name, never approximated.
"""

from collections.abc import Mapping

from jlora.errors import AdapterError

MAX_PATTERNS = 4096
MAX_LENGTH = 512
MAX_STATES = 2048
"""Of all patterns of an adapter together, those without any operator not counted."""

_ESCAPES = {"d": "0123456789", "s": " \t\n\r\f\v"}
_WORD = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_")
_PLAIN = _WORD | {".", "-"}

# A fragment is a regex tree: ("set", negated, chars) | ("cat", *f) | ("alt", *f) |
# ("repeat", f, least, most or None) | ("start",) | ("end",).
Fragment = tuple


class _Parser:
    """Recursive descent over one pattern; raises ValueError with the reason."""

    def __init__(self, text: str):
        self.text, self.at, self.depth = text, 0, 0

    def peek(self) -> str:
        return self.text[self.at : self.at + 1]

    def take(self) -> str:
        char = self.peek()
        if not char:
            raise ValueError("it ends too early")
        self.at += 1
        return char

    def parse(self) -> Fragment:
        tree = self.alternatives()
        if self.peek():
            raise ValueError(f"unbalanced {self.peek()!r}")
        return tree

    def alternatives(self) -> Fragment:
        self.depth += 1
        if self.depth > 32:
            raise ValueError("its groups nest deeper than 32")
        options = [self.sequence()]
        while self.peek() == "|":
            self.take()
            options.append(self.sequence())
        self.depth -= 1
        return options[0] if len(options) == 1 else ("alt", *options)

    def sequence(self) -> Fragment:
        items: list[Fragment] = []
        while self.peek() not in ("", "|", ")"):
            items.append(self.repeated(self.atom()))
        return ("cat", *items)

    def atom(self) -> Fragment:
        char = self.take()
        if char == "(":
            if self.peek() == "?":
                if self.text[self.at : self.at + 2] != "?:":
                    raise ValueError(
                        f"group ({self.text[self.at : self.at + 3]}... is not supported"
                    )
                self.at += 2
            inner = self.alternatives()
            if self.take() != ")":
                raise ValueError("a group is not closed")
            return inner
        if char == "[":
            return self.char_class()
        if char == "\\":
            return ("set", *self.escape())
        if char == ".":
            return ("set", True, frozenset("\n"))
        if char in "^$":
            return ("start",) if char == "^" else ("end",)
        if char in "*+?{":
            raise ValueError(f"nothing to repeat before {char!r}")
        return ("set", False, frozenset(char))

    def escape(self) -> tuple[bool, frozenset[str]]:
        char = self.take()
        kind = char.lower()
        if kind in ("d", "s", "w"):
            chars = _WORD if kind == "w" else frozenset(_ESCAPES[kind])
            return char.isupper(), chars
        if char.isalnum():
            raise ValueError(f"escape \\{char} is not supported")
        return False, frozenset(char)

    def char_class(self) -> Fragment:
        negated = self.peek() == "^"
        self.at += negated
        chars: set[str] = set()
        while not (self.peek() == "]" and chars):
            char = self.take()
            if char == "\\":
                inverse, members = self.escape()
                if inverse:
                    raise ValueError("a negated escape in a class is not supported")
                chars |= members
                continue
            if char == "[":
                raise ValueError("'[' in a class is not supported")
            if self.peek() == "-" and self.text[self.at + 1 : self.at + 2] not in ("", "]"):
                self.take()
                last = self.take()
                if not (char.isascii() and last.isascii() and char <= last) or last == "\\":
                    raise ValueError(f"range {char}-{last} is not supported")
                chars.update(map(chr, range(ord(char), ord(last) + 1)))
            else:
                chars.add(char)
        self.take()
        return ("set", negated, frozenset(chars))

    def repeated(self, item: Fragment) -> Fragment:
        bounds = {"*": (0, None), "+": (1, None), "?": (0, 1)}
        if self.peek() in bounds:
            least, most = bounds[self.take()]
        elif self.peek() == "{":
            close = self.text.find("}", self.at)
            low, comma, high = self.text[self.at + 1 : max(close, self.at + 1)].partition(",")
            if not (low.isascii() and low.isdigit() and (not high or high.isdigit())):
                raise ValueError("'{' must start a count such as {2} or {1,3}")
            least = int(low[:4])
            most = least if not comma else int(high[:4]) if high else None
            if least > 64 or (most is not None and not least <= most <= 64):
                raise ValueError("a count is above 64 or out of order")
            self.at = close + 1
        else:
            return item
        if item[0] in ("start", "end"):
            raise ValueError("an anchor is repeated")
        if self.peek() == "?":  # lazy: the same set of names matches
            self.take()
        if self.peek() in ("*", "+", "?", "{") and self.peek():
            raise ValueError("a repeat is repeated")
        return ("repeat", item, least, most)


class Pattern:
    """One compiled key. `matches(name)` is exactly peft's `re.match(rf"(.*\\.)?({key})$", name)`."""

    def __init__(self, text: str):
        self.literal = text if text and set(text) <= _PLAIN else None
        # Each state: ("set", negated, chars, next) | ("split", [next...]) | ("start"|"end", next)
        self.states: list[tuple] = []
        self._built = 0
        self._steps: dict[tuple[frozenset[int], str], frozenset[int]] = {}
        if self.literal is None:
            self.body = self._build(_Parser(text).parse(), self._add(("accept",)))

    def _add(self, state: tuple) -> int:
        self.states.append(state)
        if len(self.states) > MAX_STATES:
            raise ValueError(f"it needs more than {MAX_STATES} states")
        return len(self.states) - 1

    def _build(self, tree: Fragment, after: int) -> int:
        """Adds the states of `tree`, which continue at state `after`; returns their entry."""
        self._built += 1  # nested counts around nothing, ((){64}){64}, add no states
        if self._built > 8 * MAX_STATES:
            raise ValueError("its counts nest too deep")
        kind = tree[0]
        if kind == "set":
            return self._add((*tree, after))
        if kind == "cat":
            for item in reversed(tree[1:]):
                after = self._build(item, after)
            return after
        if kind == "alt":
            return self._add(("split", [self._build(item, after) for item in tree[1:]]))
        if kind == "repeat":
            _, item, least, most = tree
            if most is None:
                loop = self._add(("split", [after]))
                self.states[loop][1].append(self._build(item, loop))
                after = loop
            else:
                for _ in range(most - least):
                    after = self._add(("split", [after, self._build(item, after)]))
            for _ in range(least):
                after = self._build(item, after)
            return after
        return self._add((kind, after))

    def _closure(self, seeds: set[int], *, first: bool, last: bool) -> frozenset[int]:
        seen, todo = set(), list(seeds)
        while todo:
            index = todo.pop()
            if index in seen:
                continue
            seen.add(index)
            kind, *rest = self.states[index]
            if kind == "split":
                todo.extend(rest[0])
            elif (kind == "start" and first) or (kind == "end" and last):
                todo.append(rest[0])
        return frozenset(seen)

    def matches(self, name: str) -> bool:
        """Does the key match the whole of `name`, or its end after a dot?"""
        if self.literal is not None:  # '.' is any character, as in `re`
            start = len(name) - len(self.literal)
            if start < 0 or (start > 0 and name[start - 1] != "."):
                return False
            return all(k in (".", c) for k, c in zip(self.literal, name[start:], strict=True))
        live: frozenset[int] = frozenset()
        for at in range(len(name) + 1):
            seeds = set(live)
            if at == 0 or name[at - 1] == ".":
                seeds.add(self.body)
            live = self._closure(seeds, first=at == 0, last=at == len(name))
            if at < len(name):
                live = self._step(live, name[at])
        return 0 in live  # state 0 accepts, and accepts only at the end

    def _step(self, live: frozenset[int], char: str) -> frozenset[int]:
        key = (live, char)
        if key not in self._steps:
            chosen = (self.states[index] for index in live)
            self._steps[key] = frozenset(
                s[3] for s in chosen if s[0] == "set" and (char in s[2]) != s[1]
            )
        return self._steps[key]


class PatternTable:
    """rank_pattern or alpha_pattern: the first key, in file order, that matches a name wins."""

    def __init__(self, field: str, table: Mapping[str, object]):
        if len(table) > MAX_PATTERNS:
            raise AdapterError(f"{field} has {len(table)} patterns, more than {MAX_PATTERNS}")
        self.patterns: list[tuple[str, Pattern]] = []
        states = 0
        for key in table:
            try:
                if len(key) > MAX_LENGTH:
                    raise ValueError(f"it is longer than {MAX_LENGTH} characters")
                pattern = Pattern(key)
                states += len(pattern.states)
                if states > MAX_STATES:
                    raise ValueError(f"the table needs more than {MAX_STATES} states")
            except ValueError as error:
                raise AdapterError(f"{field} key {key[:80]!r} is refused: {error}") from None
            self.patterns.append((key, pattern))

    def find(self, name: str) -> str | None:
        """The first key that matches the module `name`; None: the adapter's default holds."""
        return next((key for key, pattern in self.patterns if pattern.matches(name)), None)

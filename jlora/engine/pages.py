"""KV pages: who holds which page of the cache, and which free pages still hold a known prefix.

Page 0 is the trash page that padding rows write to; it is never given out. The prefix cache is a
tree per adapter uid: a node is one full page, its key the parent's node and the page's own tokens,
so a hit compares real content and can't collide. Pages of different adapters never meet.
"""

from collections import OrderedDict, deque
from collections.abc import Sequence as Tokens
from dataclasses import dataclass, field


@dataclass(eq=False)
class _Node:
    """A known prefix. `page` is None for a root and after the node left the tree."""

    page: int | None = None
    parent: "_Node | None" = None
    key: tuple[int, ...] = ()
    children: dict[tuple[int, ...], "_Node"] = field(default_factory=dict)
    alive: bool = True


class KVPages:
    """Ref-counted pages with a prefix cache. Not thread-safe: the engine's thread owns it.

    A page is in exactly one of three states: held (references > 0), cached (no reference, but
    `match` can still find it; evicted least recently used first) or empty.
    """

    def __init__(self, num_pages: int, page_size: int, enable_prefix_caching: bool = True):
        assert num_pages >= 2, f"num_pages={num_pages}: page 0 is trash, so one more is needed"
        self.num_pages = num_pages
        self.page_size = page_size
        self.enable_prefix_caching = enable_prefix_caching
        self.queries = 0
        """Prompt tokens that were looked up, and of those found: `hits`."""
        self.hits = 0
        self._refs = [0] * num_pages
        self._empty: deque[int] = deque(range(1, num_pages))
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._roots: dict[str | None, _Node] = {}
        # The node with this page's content. Several pages can name the same node (two sequences
        # computed the same prefix at once); only the node's own page is ever found by `match`.
        self._nodes: dict[int, _Node] = {}

    @property
    def num_free(self) -> int:
        """Pages that `allocate` could give now, cached ones included."""
        return len(self._empty) + len(self._cached)

    @property
    def num_used(self) -> int:
        return self.num_pages - 1 - self.num_free

    @property
    def usage(self) -> float:
        """Share of pages in use, 0 to 1."""
        return self.num_used / (self.num_pages - 1)

    def pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)

    def match(
        self, uid: str | None, tokens: Tokens[int], max_tokens: int | None = None
    ) -> list[int]:
        """Take references to the pages of the longest known prefix of `tokens` under `uid`.

        At least one token is left to compute, because somebody wants the last one's logits.
        """
        most = len(tokens) - 1 if max_tokens is None else min(max_tokens, len(tokens) - 1)
        found: list[int] = []
        node = self._roots.get(uid) if self.enable_prefix_caching else None
        for start in range(0, most - self.page_size + 1, self.page_size):
            if node is None:
                break
            node = node.children.get(tuple(tokens[start : start + self.page_size]))
            if node is not None:
                assert node.page is not None
                found.append(node.page)
        for page in found:
            self._cached.pop(page, None)
            self._refs[page] += 1
        return found

    def count_lookup(self, queried: int, hit: int) -> None:
        """Count an admitted request's lookup (`match` doesn't: it may be tried again)."""
        if self.enable_prefix_caching:
            self.queries += queried
            self.hits += hit

    def allocate(self, n: int) -> list[int] | None:
        """n pages with one reference each, or None (and no change) if there are not so many."""
        if n > self.num_free:
            return None
        pages = []
        for _ in range(n):
            if not self._empty:
                self._forget(self._nodes[next(iter(self._cached))])
            page = self._empty.popleft()
            self._refs[page] = 1
            pages.append(page)
        return pages

    def free(self, pages: Tokens[int]) -> None:
        """Give back one reference to each. The end of a prefix is evicted before its start."""
        for page in reversed(pages):
            assert self._refs[page] > 0, f"page {page} was freed twice"
            self._refs[page] -= 1
            if self._refs[page]:
                continue
            node = self._nodes.get(page)
            if node is not None and node.page == page:
                self._cached[page] = None
            else:
                self._nodes.pop(page, None)
                self._empty.append(page)

    def publish(
        self, uid: str | None, tokens: Tokens[int], pages: Tokens[int], start: int, end: int
    ) -> None:
        """Positions start to end of `tokens` are computed: let others find the pages now full.

        `pages` are the sequence's pages from position 0, and every earlier full page has been
        published (or matched) before.
        """
        if not self.enable_prefix_caching:
            return
        for index in range(start // self.page_size, end // self.page_size):
            page = pages[index]
            if page in self._nodes:
                continue
            parent = self._nodes.get(pages[index - 1]) if index else self._root(uid)
            if parent is None or not parent.alive:
                return  # its prefix was evicted or dropped meanwhile: nobody could find it
            key = tuple(tokens[index * self.page_size : (index + 1) * self.page_size])
            node = parent.children.get(key)
            if node is None:
                node = parent.children[key] = _Node(page=page, parent=parent, key=key)
            self._nodes[page] = node

    def drop(self, uid: str | None) -> None:
        """Forget every cached page of `uid`; pages in use stay with their holders."""
        root = self._roots.pop(uid, None)
        if root is not None:
            self._forget(root)

    def check(self) -> None:
        """Assert every invariant; for tests."""
        empty, cached = set(self._empty), set(self._cached)
        held = {page for page in range(self.num_pages) if self._refs[page] > 0}
        assert len(empty) == len(self._empty), "a page is twice in the empty list"
        assert min(self._refs) >= 0
        assert not empty & cached
        assert not (empty | cached) & held
        assert empty | cached | held == set(range(1, self.num_pages)), "a page leaked"
        assert not empty & self._nodes.keys(), "an empty page still has content"
        reachable: dict[int, _Node] = {}
        stack = list(self._roots.values())
        while stack:
            for key, node in (parent := stack.pop()).children.items():
                assert node.alive
                assert node.parent is parent
                assert node.key == key
                assert len(key) == self.page_size
                assert node.page is not None
                assert node.page not in reachable
                reachable[node.page] = node
                stack.append(node)
        assert cached <= reachable.keys(), "a cached page can't be found"
        for page, node in reachable.items():
            assert self._nodes[page] is node

    def _root(self, uid: str | None) -> _Node:
        return self._roots.setdefault(uid, _Node())

    def _forget(self, node: _Node) -> None:
        """Take a node and all that follows it out of the tree: what follows can't be found now."""
        if node.parent is not None:
            del node.parent.children[node.key]
        stack = [node]
        while stack:
            dead = stack.pop()
            stack.extend(dead.children.values())
            page, dead.page, dead.parent, dead.children, dead.alive = (
                dead.page,
                None,
                None,
                {},
                False,
            )
            if page is not None and page in self._cached:
                del self._cached[page], self._nodes[page]
                self._empty.append(page)

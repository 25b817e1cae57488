"""What beginnings of conversations left in the cache, kept so that the next question about an image, and the next turn, go on
from there: a radix tree over tokens and images, cut down to a number of tokens by letting the longest unused ends go.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count

from tinylmm.generation.row_cache import Segment

Symbol = int | str
"""A token id, or in an image's place its key."""


@dataclass(eq=False)
class _Node:
    symbols: tuple[Symbol, ...]
    segment: Segment
    parent: _Node | None
    used: int = 0
    children: dict[Symbol, _Node] = field(default_factory=dict)


class Prefixes:
    """Segments by the symbols that lead to them.

    Args:
        limit: most tokens kept; 0 keeps none.

    Attributes:
        tokens: kept now.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.tokens = limit, 0
        self._root = _Node((), [], None)
        self._clock = count(1)

    def match(self, symbols: Sequence[Symbol]) -> tuple[int, list[Segment]]:
        """How many of the first symbols are kept, and their segments in order."""
        length, path, shared = self._walk(tuple(symbols))
        found = [node.segment for node in path]
        if path and shared < len(path[-1].symbols):
            found[-1] = _cut(path[-1].segment, 0, shared)
        return length, found

    def add(self, symbols: Sequence[Symbol], copy: Callable[[int, int], Segment]) -> None:
        """Keep a row.

        Args:
            copy: (begin, end) -> the segment of these tokens of the row; asked for what is not there yet.
        """
        symbols = tuple(symbols)
        length, path, shared = self._walk(symbols)
        if length == len(symbols) or len(symbols) > self.limit:
            return
        parent = path[-1] if path else self._root
        if path and shared < len(parent.symbols):
            self._split(parent, shared)
        leaf = _Node(symbols[length:], copy(length, len(symbols)), parent, next(self._clock))
        parent.children[leaf.symbols[0]] = leaf
        self.tokens += len(leaf.symbols)
        while self.tokens > self.limit:
            self._let_go()

    def _walk(self, symbols: tuple[Symbol, ...]) -> tuple[int, list[_Node], int]:
        """Symbols matched, the nodes on the way, and how many symbols of the last of them were."""
        node, length, shared, path = self._root, 0, 0, []
        now = next(self._clock)
        while length < len(symbols) and (child := node.children.get(symbols[length])) is not None:
            shared = common(child.symbols, symbols[length : length + len(child.symbols)])
            child.used = now
            path.append(child)
            length += shared
            if shared < len(child.symbols):
                break
            node = child
        return length, path, shared

    def _split(self, node: _Node, at: int) -> None:
        """Make a node end at `at`, and a child of it of the rest; copies, so that letting one go frees its memory."""
        rest = _Node(node.symbols[at:], _copied(_cut(node.segment, at, len(node.symbols))), node, node.used)
        rest.children, node.children = node.children, {node.symbols[at]: rest}
        for child in rest.children.values():
            child.parent = rest
        node.symbols, node.segment = node.symbols[:at], _copied(_cut(node.segment, 0, at))

    def _let_go(self) -> None:
        """Drop the end that was not used for the longest time."""
        leaves, stack = [], [self._root]
        while stack:
            node = stack.pop()
            stack += node.children.values()
            if not node.children and node.parent is not None:
                leaves.append(node)
        oldest = min(leaves, key=lambda node: node.used)
        if oldest.parent is not None:
            del oldest.parent.children[oldest.symbols[0]]
        self.tokens -= len(oldest.symbols)


def common(a: Sequence[Symbol], b: Sequence[Symbol]) -> int:
    """Length of what both begin with."""
    if a == b:
        return len(a)
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _cut(segment: Segment, begin: int, end: int) -> Segment:
    return [(keys[:, begin:end], values[:, begin:end]) for keys, values in segment]


def _copied(segment: Segment) -> Segment:
    return [(keys.clone(), values.clone()) for keys, values in segment]

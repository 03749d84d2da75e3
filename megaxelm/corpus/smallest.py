"""A random choice that does not depend on the order of what comes: what has the smallest keys."""

from __future__ import annotations

import heapq
from typing import Generic, TypeVar

Item = TypeVar("Item")


class SmallestKeys(Generic[Item]):
    """Keeps the items with the smallest keys, `max_bytes` in all, each key once.

    An item of more than half of `max_bytes` would push out all others: it is kept only if there is no smaller one. `bound`: keys from
    it on have no place; None while there is room for any. Whoever offers only keys below a bound that was reached elsewhere, on a part
    of the same items, changes nothing.
    """

    def __init__(self, max_bytes: int, bound: int | None = None) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self.bound = bound
        self._heap: list[tuple[int, int, Item]] = []
        self._keys: set[int] = set()
        self._large: tuple[int, int, Item] | None = None

    def add(self, key: int, item: Item, size: int) -> None:
        """Offer an item of `size` bytes. Of equal keys the first offered is kept."""
        if key in self._keys or (self.bound is not None and key >= self.bound):
            return
        if size > self.max_bytes // 2:
            if self._large is None or key < self._large[0]:
                self._large = key, size, item
            return
        heapq.heappush(self._heap, (-key, size, item))
        self._keys.add(key)
        self.num_bytes += size
        while self.num_bytes > self.max_bytes:
            negative, dropped, _ = heapq.heappop(self._heap)
            self._keys.remove(-negative)
            self.num_bytes -= dropped
            # without this bound a later small item could take a place that an earlier one was refused
            self.bound = -negative

    def discard(self, key: int) -> None:
        """Take one item out."""
        for i, (negative, size, _) in enumerate(self._heap):
            if -negative == key:
                self._heap.pop(i)
                heapq.heapify(self._heap)
                self._keys.remove(key)
                self.num_bytes -= size
                return
        if self._large is not None and self._large[0] == key:
            self._large = None

    def items(self) -> list[tuple[int, int, Item]]:
        """(key, size, item) in order of key."""
        if not self._heap and self._large is not None:
            return [self._large]
        return sorted(((-negative, size, item) for negative, size, item in self._heap), key=lambda entry: entry[0])

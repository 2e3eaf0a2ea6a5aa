"""KV memory of one instance: what is held, what is cached, what is in host memory."""

from __future__ import annotations

from collections import OrderedDict


class Memory:
    """Token counts. Cached prefixes are free for whoever needs the memory, oldest first.

    held: KV of those who run, are being prefilled, paused on the device, or promised a place here.
    host: KV of paused requests in host memory. copied_in, copied_out: over host and device in all.
    """

    def __init__(self, capacity: int, host_capacity: int) -> None:
        self.capacity = capacity
        self.host_capacity = host_capacity
        self.held = 0
        self.host = 0
        self.most_held = 0
        self.copied_in = 0
        self.copied_out = 0
        self._cache: OrderedDict[int, int] = OrderedDict()
        self._cached = 0

    @property
    def free(self) -> int:
        return self.capacity - self.held

    def take(self, tokens: int) -> None:
        self.held += tokens
        if self.held > self.most_held:
            self.most_held = self.held
            if self.held > self.capacity:
                raise RuntimeError(f"{self.held} KV tokens held where {self.capacity} fit")
        if self._cached:
            self._trim()

    def give(self, tokens: int) -> None:
        self.held -= tokens
        if self.held < 0:
            raise RuntimeError(f"{-self.held} more KV tokens given back than were held")

    def to_host(self, tokens: int) -> None:
        self.copy_to_host(tokens)
        self.give(tokens)

    def copy_to_host(self, tokens: int) -> None:
        """The KV stays on the device until its copy has ended; `give` it back then."""
        self.host += tokens
        self.copied_out += tokens
        if self.host > self.host_capacity:
            raise RuntimeError("host memory is over its budget")

    def from_host(self, tokens: int) -> None:
        self.leave_host(tokens)
        self.copied_in += tokens
        self.take(tokens)

    def leave_host(self, tokens: int) -> None:
        self.host -= tokens
        if self.host < 0:
            raise RuntimeError("more KV left host memory than was there")

    def remember(self, name: int, tokens: int) -> None:
        """A request that ends leaves its KV behind for whoever comes with the same beginning."""
        self._cached += tokens - self._cache.pop(name, 0)
        self._cache[name] = tokens
        self._trim()

    def knows(self, name: int) -> bool:
        return name in self._cache

    def recall(self, name: int) -> bool:
        """Whether the KV is still here; it is its holder's from now on."""
        tokens = self._cache.pop(name, None)
        self._cached -= tokens or 0
        return tokens is not None

    def _trim(self) -> None:
        while self._cached and self._cached > self.free:
            self._cached -= self._cache.popitem(last=False)[1]

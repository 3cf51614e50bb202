"""Streams on the device of pretend_cuda.py, and who was where when: what a GPU would only show by chance.

Under ``Watch`` every op belongs to the queue that is current. Queues are ordered by events alone (vector clocks), so a
fault is found whatever the order in which the host has called. It is a fault

* to read what another queue has written without having waited for it;
* to write what another queue still reads or writes;
* to use on one queue the memory of another one without telling the allocator (``Streams.use``).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from tests.cuda.pretend_cuda import Device, OnDevice

MAIN = "main"
Clock = dict[str, int]  # of each queue how many of its ops are behind this point


class Watch(Device):
    def __init__(self) -> None:
        super().__init__()
        self.faults: list[str] = []
        self.current = MAIN
        self.count = 0  # of Streams
        self.clocks: dict[str, Clock] = {MAIN: {MAIN: 0}}
        self.maker: dict[int, str] = {}
        self.written: dict[int, tuple[str, int]] = {}
        self.read: dict[int, dict[str, int]] = {}
        self.told_of: set[tuple[int, str]] = set()
        self.alive: list[Any] = []  # no address comes twice
        self.begun = 0  # main's clock when the last Streams were made: older memory is main's till then

    def is_behind(self, queue: str, time: int) -> bool:
        """Is what `queue` did at that time done before what the current one does now?"""
        return queue == self.current or self.clocks[self.current].get(queue, -1) >= time

    def storage(self, x: OnDevice) -> int:
        held = x.inner.untyped_storage()
        key: int = held._cdata
        if key not in self.maker:
            self.alive.append(held)
            self.maker[key] = MAIN
            self.written[key] = MAIN, self.begun
        return key

    def fault(self, func: Any, what: str) -> None:
        self.faults.append(f"{func} on {self.current}: {what}")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [self.storage(x) for x in tree_leaves((args, kwargs)) if isinstance(x, OnDevice)]
        changed = [
            self.storage(value)
            for argument, value in zip(func._schema.arguments, args, strict=False)
            if argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, OnDevice)
        ]
        out = super().__torch_dispatch__(func, types, args, kwargs)
        made = [x for x in tree_leaves(out) if isinstance(x, OnDevice)]
        new = [x for x in made if x.inner.untyped_storage()._cdata not in self.maker]
        if not new and not changed and func.is_view:
            return out
        now = self.clocks[self.current][self.current] = self.clocks[self.current][self.current] + 1
        for key in given:
            writer, time = self.written[key]
            if not self.is_behind(writer, time):
                self.fault(func, f"reads what {writer} may not have written yet")
            if self.maker[key] != self.current and (key, self.current) not in self.told_of:
                self.fault(func, f"uses memory of {self.maker[key]} of which the allocator has not been told")
        for key in changed:
            for reader, time in self.read.get(key, {}).items():
                if not self.is_behind(reader, time):
                    self.fault(func, f"writes what {reader} may still read")
            self.written[key] = self.current, now
        for key in given:
            self.read.setdefault(key, {})[self.current] = now
        for x in new:
            key = x.inner.untyped_storage()._cdata
            self.alive.append(x.inner.untyped_storage())
            self.maker[key] = self.current
            self.written[key] = self.current, now
        return out


class Streams:
    """As wavefront.Streams. watch: the Watch that is in force."""

    def __init__(self, watch: Watch, count: int) -> None:
        self.watch = watch
        watch.count += 1
        watch.begun = watch.clocks[MAIN][MAIN]
        self.names = [MAIN, *(f"stream {i} of call {watch.count}" for i in range(1, count))]
        for name in self.names:
            watch.clocks.setdefault(name, {name: 0})

    @contextlib.contextmanager
    def on(self, i: int) -> Iterator[None]:
        before, self.watch.current = self.watch.current, self.names[i]
        try:
            yield
        finally:
            self.watch.current = before

    def record(self, i: int) -> Clock:
        return dict(self.watch.clocks[self.names[i]])

    def wait(self, i: int, event: Clock) -> None:
        own = self.watch.clocks[self.names[i]]
        for queue, time in event.items():
            own[queue] = max(own.get(queue, -1), time)

    def use(self, x: Tensor, i: int) -> None:
        assert isinstance(x, OnDevice)
        self.watch.told_of.add((self.watch.storage(x), self.names[i]))

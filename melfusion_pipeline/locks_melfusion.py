"""Threads that share a component of a pipeline use it one after the other."""

import functools
import threading
import weakref
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any


class ComponentLocks:
    """One lock for each component, which every pipeline that has it finds."""

    def __init__(self) -> None:
        self._locks = weakref.WeakKeyDictionary()
        self._table = threading.Lock()

    def of(self, components: Iterable[Any]) -> list[threading.RLock]:
        """Gives the locks of those `components` that are not None, in an order in which none wait in a circle."""
        with self._table:
            present = [component for component in components if component is not None]
            return sorted((self._locks.setdefault(component, threading.RLock()) for component in present), key=id)


def one_at_a_time(method: Callable) -> Callable:
    """Lets methods that use the same component run one after the other; a thread whose components are busy waits.

    Args:
        method: Of a `DiffusionPipeline` whose class has `ComponentLocks` as `_locks`.

    Returns:
        The method.
    """

    @functools.wraps(method)
    def locked(self: Any, *args: Any, **kwargs: Any) -> Any:
        with ExitStack() as held:
            for lock in self._locks.of(self.components.values()):
                held.enter_context(lock)
            return method(self, *args, **kwargs)

    return locked

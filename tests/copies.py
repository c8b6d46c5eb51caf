"""Components that are built once in a process and copied for each test, which takes a fifth of the time."""

import copy
import functools
import io
import pickle
from collections.abc import Callable

import torch
import untrained


class TensorsApart(pickle.Pickler):
    """Pickles an object without its tensors, which are kept as they are: pickling each of them takes long."""

    def __init__(self, file: io.BytesIO):
        super().__init__(file)
        self.tensors: list[torch.Tensor] = []
        self.indices: dict[int, int] = {}

    def persistent_id(self, value: object) -> int | None:
        if not isinstance(value, torch.Tensor):
            return None
        if id(value) not in self.indices:
            self.indices[id(value)] = len(self.tensors)
            self.tensors.append(value)
        return self.indices[id(value)]


class TensorsCopied(pickle.Unpickler):
    """Makes an object anew of what `TensorsApart` wrote, with copies of its tensors."""

    def __init__(self, file: io.BytesIO, tensors: list[torch.Tensor]):
        super().__init__(file)
        self.tensors = tensors
        self.copies: dict[int, torch.Tensor] = {}

    def persistent_load(self, index: int) -> torch.Tensor:
        return copy.deepcopy(self.tensors[index], self.copies)


def copier(value: object) -> Callable[[], object]:
    """Returns a function that gives another copy of `value` with each call."""
    file = io.BytesIO()
    writer = TensorsApart(file)
    writer.dump(value)
    return lambda: TensorsCopied(io.BytesIO(file.getvalue()), writer.tensors).load()


@functools.cache
def build(**arguments) -> tuple[Callable[[], dict], torch.Tensor]:
    return copier(untrained.untrained_components(**arguments)), torch.get_rng_state()


def untrained_components(**arguments) -> dict:
    """Gives what `untrained.untrained_components` builds of the same arguments, and leaves torch's seed as it does."""
    copied, state = build(**arguments)
    torch.set_rng_state(state)
    return copied()

"""Refusing single arguments of the wrong type or out of range, by name."""

import math
import os
import sys
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch


def check_integer(name: str, value: Any, minimum: int, maximum: int | None = None) -> None:
    """Refuses what is no whole number within limits.

    Args:
        name: The argument's name, for the message.
        value: What was given.
        minimum: The least.
        maximum: The greatest, or None.

    Raises:
        TypeError: If it is no int.
        ValueError: If it is out of range.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"`{name}` must be an int, got {value!r:.80}.")
    if value < minimum or (maximum is not None and value > maximum):
        limits = f"at least {minimum}" if maximum is None else f"in [{minimum}, {maximum}]"
        raise ValueError(f"`{name}` must be {limits}, got {value}.")


def check_real(name: str, value: Any, minimum: float = -math.inf, maximum: float = math.inf) -> None:
    """Refuses what is no finite number within limits.

    Args:
        name: The argument's name, for the message.
        value: What was given.
        minimum: The least.
        maximum: The greatest.

    Raises:
        TypeError: If it is no real number.
        ValueError: If it is NaN, infinite or out of range.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"`{name}` must be a number, got {value!r:.80}.")
    # Compared instead of converted: an int may be larger than any float. But a narrow float would narrow the limits.
    compared = float(value) if isinstance(value, np.floating) else value
    if not max(minimum, -sys.float_info.max) <= compared <= min(maximum, sys.float_info.max):
        limits = "" if minimum == -math.inf else f" and in [{minimum:.5g}, {maximum:.5g}]"
        limits = f" and at least {minimum:.5g}" if minimum > -math.inf and maximum == math.inf else limits
        raise ValueError(f"`{name}` must be finite{limits}, got {value}.")


def check_positive(name: str, value: Any) -> None:
    """Refuses what is no finite number above 0.

    Args:
        name: The argument's name, for the message.
        value: What was given.

    Raises:
        TypeError: If it is no real number.
        ValueError: If it is NaN, infinite, or not above 0.
    """
    check_real(name, value)
    if value <= 0:
        raise ValueError(f"`{name}` must be above 0, got {value}.")


def check_reals(name: str, values: Any) -> None:
    """Refuses what is no list of finite numbers.

    Args:
        name: The argument's name, for the message.
        values: What was given: a list, tuple, array or tensor, `[N]`.

    Raises:
        TypeError: If it is none of these, or holds anything but real numbers.
        ValueError: If a number is NaN or infinite.
    """
    values = values.tolist() if isinstance(values, (np.ndarray, torch.Tensor)) else values
    if not isinstance(values, (list, tuple)):
        raise TypeError(f"`{name}` must be a list of numbers, got {values!r:.80}.")
    for value in values:
        check_real(name, value)


def check_path(name: str, value: Any) -> None:
    """Refuses what cannot be the path of a file.

    Args:
        name: The argument's name, for the message.
        value: What was given.

    Raises:
        TypeError: If it is neither a str nor a `pathlib.Path` or the like.
    """
    if not isinstance(value, (str, os.PathLike)):
        raise TypeError(f"`{name}` must be the path of a file, a str or a pathlib.Path, got {value!r:.80}.")

"""Arguments as callers may pass them, checked: integers and sequences.

For every module that takes them from a caller. Apart because all of them shall accept the same
and refuse in the same words: the argument's name, what was found, what was wanted.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from typing import Any


def check_integer(
    name: str, value: Any, low: int, high: int | None = None, *, wanted: str | None = None
) -> int:
    """An integer of any kind (Python's, numpy's, whatever has `__index__`) as an int.

    Args:
        name: Of the argument, for the message.
        value: What was passed. A bool is not an integer here.
        low: Least value.
        high: Greatest value; None: no bound.
        wanted: What to say was wanted, if not just the bounds.

    Raises:
        ValueError: It is no integer, or out of bounds.
    """
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is not None and low <= number and (high is None or number <= high):
        return number
    bounds = f">= {low}" if high is None else f"from {low} to {high}"
    raise ValueError(f"{name} is {value!r}; wanted {wanted or f'an integer {bounds}'}")


def check_iterable(name: str, value: Any, wanted: str) -> Iterable[Any]:
    """What can be gone through for its items: not a string, bytes or a dict.

    Raises:
        TypeError: It is none.
    """
    if isinstance(value, Iterable) and not isinstance(value, str | bytes | bytearray | Mapping):
        return value
    raise TypeError(f"{name} is of type {type(value).__name__}; wanted {wanted}")

"""What an argument may be: each refusal names the argument, what it expects, and what it got."""

from __future__ import annotations

import math
import operator
from typing import Any

import numpy as np

__all__ = ["check_choice", "check_count", "check_flag", "check_fraction", "check_number", "check_seed", "is_number"]


def is_number(value: Any) -> bool:
    """Whether it is one finite real number; True and False are none."""
    real = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
    return real and math.isfinite(value)


def check_number(name: str, value: Any, *, least: float = -math.inf, above: float = -math.inf) -> None:
    """Refuse what is not a finite number >= `least` and > `above`."""
    if not is_number(value) or value < least or value <= above:
        bound = f" > {above:g}" if math.isfinite(above) else f" >= {least:g}" if math.isfinite(least) else ""
        raise ValueError(f"Expected a finite number {name}{bound}. Received: {name}={value!r}")


def check_fraction(name: str, value: Any) -> None:
    """Refuse what is not a number in [0, 1]."""
    if not is_number(value) or not 0 <= value <= 1:
        raise ValueError(f"Expected {name} to be a fraction in [0, 1]. Received: {name}={value!r}")


def check_count(name: str, value: Any, most: float = math.inf) -> None:
    """Refuse what is not an integer from 1 to `most`."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or not 1 <= value <= most:
        bound = f"from 1 to {most:g}" if math.isfinite(most) else ">= 1"
        raise ValueError(f"Expected {name}, an integer {bound}. Received: {name}={value!r}")


def check_seed(seed: Any) -> int:
    """A seed as an integer.

    Raises:
        ValueError: it is none, or below 0.
    """
    if isinstance(seed, bool) or not hasattr(seed, "__index__") or operator.index(seed) < 0:
        raise ValueError(f"Expected seed, an integer >= 0. Received: seed={seed!r}")
    return operator.index(seed)


def check_flag(name: str, value: Any) -> None:
    """Refuse what is neither True nor False."""
    if not isinstance(value, bool | np.bool_):
        raise ValueError(f"Expected {name} to be True or False. Received: {name}={value!r}")


def check_choice(name: str, value: Any, known: tuple) -> None:
    """Refuse what is not among `known`."""
    if not isinstance(value, str | None) or value not in known:
        raise ValueError(f"Expected {name} to be one of {known}. Received: {name}={value!r}")

"""Values of a config.json of Hugging Face transformers, checked. Messages name the key and what to do."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError


def whole(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """An integer above 0. Raises ValueError."""
    value = config.get(key)
    value = default if value is None else value
    if type(value) is not int or not 0 < value < 1 << 31:
        raise ValueError(f"{key}: {value!r} is not an integer above 0; use a complete config.json, or set {key}")
    return value


def number(config: Mapping[str, Any], key: str, default: float) -> float:
    """A number above 0. Raises ValueError."""
    value = config.get(key, default)
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise ValueError(f"{key}: {value!r} is not a number above 0; use a complete config.json, or set {key}")
    return float(value)


def truth(config: Mapping[str, Any], key: str, default: bool = False) -> bool:
    """True or false. Raises ValueError."""
    value = config.get(key, default)
    if type(value) is not bool:
        raise ValueError(f"{key}: {value!r} is neither true nor false; use one of them")
    return value


def first_problem(error: ValueError) -> str:
    """The first problem of a validation error, or the text of another one, in one line."""
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False)[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}".removeprefix(": ")
    return str(error)

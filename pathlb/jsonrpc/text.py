"""JSON taken apart without rewriting it: each element of an array with its own text, numbers as they were written."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from itertools import accumulate
from json import JSONDecoder
from typing import Any, NamedTuple

_SPACE = re.compile(r"[ \t\n\r]*")
_NEXT = re.compile(r"[ \t\n\r]*([,\]])[ \t\n\r]*")
_NO_BRACKETS = re.compile(r"[^][{}]+")
_STEPS = {"[": 1, "{": 1, "]": -1, "}": -1}

# Python stops a parser at its recursion limit, 1,000 calls. py_ecc, which web3 imports, raises that to 100,000, where a
# body of brackets overflows the C stack and ends the process. So many take 512 KiB of it, the least a thread gets.
_DEEPEST = 2_500


Pairs = tuple[tuple[str, Any], ...]
"""A JSON object as its members in order, the ones with the same key too. No other JSON value is read as a tuple."""


class Element(NamedTuple):
    """An element of an array: its value, and its text from the first character to the last."""

    value: Any
    text: str


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


# Requests are read as strictly as the strictest server does, since what they mean decides what may be sent twice.
_strict = JSONDecoder(object_pairs_hook=tuple, parse_constant=_refuse)
_lenient = JSONDecoder()


def is_array(data: bytes) -> bool:
    """Whether it can only be an array, by its first byte."""
    first = data[:1]
    return first == b"[" or (first in b" \t\r\n" and data.lstrip(b" \t\r\n")[:1] == b"[")


def parse(data: bytes) -> Any:
    """The value of a JSON text, its objects as `Pairs`. Raises `ValueError` for anything else."""
    text = _decode(data)
    start = _after_space(text, 0)
    value, end = _read(_strict, text, start)
    if _after_space(text, end) != len(text):
        raise ValueError("there is more than one value")
    return value


def parse_elements(data: bytes) -> list[Element]:
    """The elements of a JSON array, their objects as `Pairs`. Raises `ValueError` for anything else."""
    return _elements(_strict, data)


def parse_answers(data: bytes) -> list[Element]:
    """The elements of a JSON array, their objects as dicts, NaN and the like let through.

    Raises `ValueError` for anything else.
    """
    return _elements(_lenient, data)


def parse_answer(data: bytes) -> Any:
    """The value of a JSON text, its objects as dicts. Raises `ValueError` for anything else."""
    text = _decode(data)
    try:
        return _lenient.decode(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def join(texts: Iterable[str]) -> bytes:
    """An array of elements given by their texts."""
    return f"[{','.join(texts)}]".encode()


def _elements(decoder: JSONDecoder, data: bytes) -> list[Element]:
    text = _decode(data)
    start = _after_space(text, 0)
    if not text.startswith("[", start):
        raise ValueError("not an array")
    found: list[Element] = []
    start = _after_space(text, start + 1)
    if text.startswith("]", start):
        end = start + 1
    else:
        while True:
            value, stop = _read(decoder, text, start)
            found.append(Element(value, text[start:stop]))
            mark = _NEXT.match(text, stop)
            if mark is None:
                raise ValueError("neither a comma nor the end of the array follows an element")
            start = mark.end()
            if mark[1] == "]":
                end = start
                break
    if _after_space(text, end) != len(text):
        raise ValueError("something follows the array")
    return found


def _decode(data: bytes) -> str:
    """The text, if it can be parsed without harm. Raises `ValueError`."""
    text = data.decode()
    if sys.getrecursionlimit() > _DEEPEST and text.count("[") + text.count("{") > _DEEPEST < _depth(text):
        raise ValueError("nested too deeply")
    return text


def _depth(text: str) -> int:
    """How deep the brackets are nested, up to where it stops being JSON at least."""
    plain = text.replace("\\\\", "").replace('\\"', "")
    brackets = _NO_BRACKETS.sub("", "".join(plain.split('"')[::2]))
    return max(accumulate(map(_STEPS.__getitem__, brackets)), default=0)


def _read(decoder: JSONDecoder, text: str, start: int) -> tuple[Any, int]:
    try:
        return decoder.raw_decode(text, start)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _after_space(text: str, start: int) -> int:
    space = _SPACE.match(text, start)
    assert space is not None  # it matches nothing, too
    return space.end()

"""JSON taken apart and put together again, nothing of it rewritten."""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonrpc_helpers import FUZZ

from pathlb.jsonrpc.text import is_array, join, parse, parse_answer, parse_answers, parse_elements

SPACE = st.text(" \t\r\n", max_size=2)
NUMBERS = st.from_regex(r"-?(0|[1-9][0-9]{0,40})(\.[0-9]{1,30})?([eE][+-]?[0-9]{1,2})?", fullmatch=True)
STRINGS = st.text(max_size=20).map(json.dumps) | st.text(max_size=20).map(
    lambda text: json.dumps(text, ensure_ascii=False)
)


@st.composite
def _arrays(draw: st.DrawFn, values: st.SearchStrategy[str]) -> str:
    items = draw(st.lists(values, max_size=4))
    return "[" + ",".join(draw(SPACE) + item + draw(SPACE) for item in items) + "]"


@st.composite
def _objects(draw: st.DrawFn, values: st.SearchStrategy[str]) -> str:
    items = draw(st.lists(values, max_size=4))
    return "{" + ",".join(draw(STRINGS) + draw(SPACE) + ":" + item for item in items) + "}"


VALUES: st.SearchStrategy[str] = st.recursive(
    NUMBERS
    | STRINGS.filter(lambda text: text.isprintable() and "\ud800" not in text)
    | st.sampled_from(["true", "null"]),
    lambda inner: _arrays(inner) | _objects(inner),
    max_leaves=8,
)


def encodable(text: str) -> bool:
    return not any("\ud800" <= ch <= "\udfff" for ch in text)


class TestElements:
    @FUZZ
    @given(st.lists(VALUES.filter(encodable), max_size=6), st.data())
    def test_each_element_keeps_its_text(self, texts: list[str], data: st.DataObject) -> None:
        spaced = ",".join(data.draw(SPACE) + text + data.draw(SPACE) for text in texts)
        body = f"{data.draw(SPACE)}[{spaced}]{data.draw(SPACE)}".encode()
        for elements in (parse_elements(body), parse_answers(body)):
            assert [element.text for element in elements] == texts
            assert join(element.text for element in elements) == ("[" + ",".join(texts) + "]").encode()
        assert [element.value for element in parse_answers(body)] == json.loads(body)

    def test_numbers_are_as_they_were_written(self) -> None:
        body = b'[1.0, 1e2, -0, 123456789012345678901234567890, 0.1000, {"id": 1.10E+5}]'
        assert join(element.text for element in parse_elements(body)) == body.replace(b", ", b",")

    @pytest.mark.parametrize(
        "body",
        [b"", b"[", b"[1", b"[1,", b"[1,]", b"[,]", b"[1 2]", b"[1]]", b"[1] x", b"{}", b"1", b"[\xff]", b"[tru]"],
    )
    def test_what_is_no_array_is_an_error(self, body: bytes) -> None:
        for parser in (parse_elements, parse_answers):
            with pytest.raises(ValueError, match=r"\w"):
                parser(body)

    @FUZZ
    @given(st.binary(max_size=50) | st.text('[]{},:"1 \\n', max_size=30).map(str.encode))
    def test_it_takes_what_json_takes(self, body: bytes) -> None:
        expected: Any = None
        with suppress(ValueError):
            expected = json.loads(body.decode())
        try:
            found = [element.value for element in parse_answers(body)]
        except ValueError:
            found = None
        assert found == (expected if isinstance(expected, list) else None)

    def test_members_with_one_name_are_all_there(self) -> None:
        assert parse(b'{"a":1,"a":[{"b":2}]}') == (("a", 1), ("a", [(("b", 2),)]))

    def test_answers_may_hold_what_is_no_json(self) -> None:
        assert parse_answers(b"[NaN]")[0].text == "NaN"
        with pytest.raises(ValueError, match="NaN is not JSON"):
            parse_elements(b"[NaN]")

    @pytest.mark.parametrize("limit", [1_000, 1_000_000])
    @pytest.mark.parametrize("parser", [parse, parse_answer, parse_elements, parse_answers])
    def test_too_deep_is_an_error_like_any_other(self, parser: Any, limit: int) -> None:
        """Where the recursion limit is raised the process would end: py_ecc does that, and web3 imports it."""
        before = sys.getrecursionlimit()
        sys.setrecursionlimit(limit)
        try:
            for body in (b"[" * 1_000_000, b"[" * 100_000 + b"]" * 100_000, b'["\\\\",' + b'{"a":[' * 50_000):
                with pytest.raises(ValueError, match="nested too deeply"):
                    parser(body)
        finally:
            sys.setrecursionlimit(before)

    @pytest.mark.parametrize("parser", [parse, parse_answer, parse_elements, parse_answers])
    def test_many_brackets_are_not_deep(self, parser: Any) -> None:
        before = sys.getrecursionlimit()
        sys.setrecursionlimit(100_000)
        try:
            parser(b'["' + b"[" * 10_000 + b'\\"{' * 10_000 + b'\\\\",' + b"[[],{}]," * 5_000 + b"1]")
        finally:
            sys.setrecursionlimit(before)

    @pytest.mark.parametrize(
        ("body", "expected"),
        [
            (b"[", True),
            (b" \t\r\n[1]", True),
            (b"", False),
            (b"  ", False),
            (b"{}", False),
            (b" {[", False),
            (b"\x0b[", False),
        ],
    )
    def test_an_array_is_told_by_its_first_byte(self, body: bytes, expected: bool) -> None:
        assert is_array(body) is expected

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gateway.core.ledger import COLUMNS, POSTGRESQL, SQLITE, Row, array, encode, is_whole, row_of
from gateway.core.prices import Price
from gateway.core.principal import Principal
from gateway.core.record import Record
from gateway.core.usage import Usage

SQL = Path(__file__).parents[2] / "src/gateway/sql"


def record(**more: object) -> Record:
    return msgspec.structs.replace(Record("id-1", "POST", "/v1/chat/completions", 10.0, ended=12.5), **more)


def test_a_row_says_all_of_a_request() -> None:
    made = row_of(
        record(
            principal=Principal(key="k1", id="k1", tenant="acme"),
            model="m",
            served_model="m-q4",
            backend="a",
            attempts=2,
            status=502,
            code="backend_error",
            fault="backend",
            queued=0.25,
            first_token=10.5,
            usage=Usage(1000, 500, 100, reasoning_tokens=50),
            received_bytes=80,
            sent_bytes=900,
            session="s",
            stream=True,
        ),
        1_700_000_000.0,
        {"m": Price(1.0, 2.0, 0.5)},
    )
    assert made == Row(
        request_id="id-1",
        started=1_700_000_010.0,
        tenant="acme",
        key="k1",
        model="m",
        served_model="m-q4",
        route="/v1/chat/completions",
        backend="a",
        attempts=2,
        status=502,
        code="backend_error",
        fault="backend",
        queue_seconds=0.25,
        first_token_seconds=0.5,
        total_seconds=2.5,
        prompt_tokens=1000,
        completion_tokens=500,
        cached_tokens=100,
        reasoning_tokens=50,
        estimated=False,
        received_bytes=80,
        sent_bytes=900,
        session="s",
        stream=True,
        cost=1950,
    )


def test_without_prices_there_is_no_cost_and_a_model_serves_itself() -> None:
    made = row_of(record(model="m"), 0.0, {})
    assert (made.cost, made.served_model, made.first_token_seconds, made.fault) == (None, "m", None, "")


def test_a_prompt_that_nobody_counted_is_estimated_by_its_bytes() -> None:
    cut = row_of(record(usage=Usage(0, 7, estimated=True), received_bytes=400, attempts=1), 0.0, {})
    assert (cut.prompt_tokens, cut.completion_tokens, cut.estimated) == (101, 7, True)
    left = row_of(record(code="client_cancelled", received_bytes=400, attempts=1), 0.0, {})
    assert (left.prompt_tokens, left.completion_tokens, left.estimated) == (101, 0, True)
    said = row_of(record(code="client_cancelled", usage=Usage(90, 7), received_bytes=400, attempts=1), 0.0, {})
    assert (said.prompt_tokens, said.estimated) == (90, True)


def test_what_no_backend_has_seen_used_nothing() -> None:
    queued = row_of(record(code="client_cancelled", received_bytes=400), 0.0, {})
    assert (queued.prompt_tokens, queued.estimated) == (0, False)


@given(st.text(), st.text(), st.text())
@example("", "\0", "\0")
def test_any_names_make_one_whole_line_of_bounded_length(model: str, served: str, session: str) -> None:
    for name in (model, model * 100, "\0"):
        line = encode(row_of(record(model=name, served_model=served, session=session), 0.0, {}))
        assert is_whole(line)
        assert b"\n" not in line
        assert len(line) < 4096


def test_a_line_that_was_cut_is_not_whole() -> None:
    line = encode(row_of(record(model="]"), 0.0, {}))
    assert is_whole(line)
    assert not any(is_whole(line[:length]) for length in range(len(line)))
    assert not is_whole(line.replace(b'"]"', b'"\\u0000"'))
    assert not is_whole(b"\xff")


def test_lines_are_one_array() -> None:
    rows = [row_of(record(request_id=id), 0.0, {}) for id in ("a", "\u00e9")]
    assert msgspec.json.decode(array([encode(row) for row in rows]), type=list[Row]) == rows


@pytest.mark.parametrize("dialect", [SQLITE, POSTGRESQL], ids=["sqlite", "postgresql"])
def test_the_schema_has_the_columns_of_a_row_in_their_order(dialect: object) -> None:
    schema = (SQL / f"{dialect.schema}-1.sql").read_text()  # type: ignore[attr-defined]
    assert tuple(re.findall(r"^    (\w+) (?:text|real|integer|double precision|bigint|boolean)\b", schema, re.M)) == COLUMNS

"""What a request is charged, however it ends."""

from __future__ import annotations

import json
from typing import Any

import pytest
from twisted.internet.defer import CancelledError

from gateway.core.errors import BackendFailed, GatewayError
from gateway.core.prices import Price, of_record
from gateway.core.principal import NO_LIMITS, Budget, Limits, Principal
from gateway.core.ratelimit import PARTS
from gateway.core.record import Record
from gateway.core.usage import Usage
from gateway.limiter import Allowance, Limiting, LocalLimiter

from .fakes import ANSWER, FakeResponse, Gateway, body_of, error_of

ASKED = b'{"messages":[{"role":"user","content":"hello"}],"max_tokens":100%b}'
LEFT = "x-ratelimit-remaining-tokens"


def limiter() -> LocalLimiter:
    return LocalLimiter(lambda: 0.0, lambda: 1_700_000_000.0)


def charged(record: Record, problem: BaseException | None = None) -> int:
    """Tokens that remain used of 110 reserved, 10 of them for the prompt."""
    counting, limits = limiter(), Limits(tokens=1000)
    reservation = counting.reserve("k", limits, 110, 0)
    Allowance(reservation, 10, None, lambda: 0.0).end(record, problem)
    counts = counting.standing("k", limits)
    assert counts.held == 0
    return counts.tokens // PARTS


def ended(**fields: Any) -> Record:
    return Record("id", "POST", "/", 0.0, attempts=1, **fields)


@pytest.mark.parametrize(
    ("record", "problem", "tokens"),
    [
        (ended(usage=Usage(12, 30)), None, 42),
        (ended(usage=Usage(12, 300)), None, 312),
        (ended(), None, 110),  # an answer that does not tell
        (ended(code="rejected_by_backend"), None, 0),
        (ended(), BackendFailed("backend_error", "no"), 0),
        (ended(), GatewayError("queue_timeout", "late"), 0),
        (ended(), CancelledError(), 110),  # it left while a backend worked
        (Record("id", "POST", "/", 0.0), CancelledError(), 0),  # it left the queue
        (ended(usage=Usage(0, 7, estimated=True)), CancelledError(), 17),  # it left in mid-stream
        (ended(usage=Usage(0, 7, estimated=True), code="backend_error"), None, 17),
        (ended(usage=Usage(0, 0, estimated=True)), CancelledError(), 10),
        (ended(), RuntimeError("a bug"), 110),
    ],
)
def test_a_request_is_charged_what_it_used(record: Record, problem: BaseException | None, tokens: int) -> None:
    assert charged(record, problem) == tokens


def test_a_key_without_limits_is_told_nothing_and_not_counted() -> None:
    gateway = Gateway()
    response = gateway.post()
    gateway.agent.answer(FakeResponse(), ANSWER)
    assert not gateway.done(response).headers.hasHeader(LEFT)
    assert gateway.limiting.limits_of(Record("id", "POST", "/", 0.0).principal) is NO_LIMITS
    assert gateway.status().limits.keys == 0


def test_the_usual_path_asks_nobody_and_settles_when_the_answer_ends() -> None:
    gateway = Gateway(limits=Limits(requests=10, tokens=1000))
    response = gateway.post(ASKED % b"")
    assert len(gateway.agent.requests) == 1, "it is on its way in the same turn"
    gateway.agent.answer(FakeResponse(), ANSWER)
    told = gateway.done(response)
    assert int(told.headers.getRawHeaders(LEFT)[0]) < 900
    malformed = gateway.done(gateway.post(b"{}"))
    assert malformed.headers.getRawHeaders(LEFT) == ["992"]
    assert malformed.headers.getRawHeaders("x-ratelimit-remaining-requests") == ["9"]


def test_each_of_several_choices_is_reserved() -> None:
    gateway = Gateway(limits=Limits(tokens=1000))
    refused = gateway.done(gateway.post(ASKED % b',"n":10'))
    assert refused.code == 429
    assert refused.headers.getRawHeaders("x-should-retry") == ["false"]
    assert "up to 1019 tokens" in error_of(gateway, refused)["message"]
    assert gateway.status().limits.limited == {"size": 1}


@pytest.mark.parametrize("most", [-5, 0, 10**18])
def test_an_absurd_length_mints_nothing(most: int) -> None:
    counting = Gateway(limits=Limits(tokens=1000))
    response = counting.post(json.dumps({"messages": [{"role": "user", "content": "x"}], "max_tokens": most}).encode())
    if counting.agent.waiting:
        counting.agent.answer(FakeResponse(), ANSWER)
    left = int(counting.done(response).headers.getRawHeaders(LEFT)[0])
    assert left <= 1000


def test_a_budget_in_money_goes_by_the_price_table() -> None:
    gateway = Gateway(limits=Limits(budget=Budget(0.00025, "money", "day")))
    gateway.limiting._prices = {"m": Price(prompt=1.0, completion=2.0)}
    first = gateway.post(ASKED % b',"model":"m","n":2')  # two answers of 200 millionths: more than there is
    assert error_of(gateway, gateway.done(first))["code"] == "insufficient_quota"
    body = ASKED % b',"model":"m"'
    second = gateway.post(body)  # 200 and the prompt, settled to 3 + 2 * 5
    gateway.agent.answer(FakeResponse(), ANSWER)
    assert body_of(gateway, gateway.done(second)) == ANSWER
    gateway.post(body)
    assert len(gateway.agent.requests) == 2
    assert gateway.done(gateway.post(body)).code == 429
    gateway.agent.answer(FakeResponse(), ANSWER)
    gateway.client.flush()


def test_limits_of_the_key_come_before_those_for_everyone() -> None:
    own = Limits(requests=5)
    record = Record("id", "POST", "/", 0.0)
    limiting = Limiting(limiter(), lambda: 0.0, Limits(requests=1))
    principal = type(record.principal)(key="k", limits=own)
    assert limiting.limits_of(principal) is own
    assert limiting.limits_of(record.principal) == Limits(requests=1)


def test_a_key_that_has_no_limits_of_its_own_has_the_usual_ones() -> None:
    usual = Limits(requests=1)
    limiting = Limiting(limiter(), lambda: 0.0, usual)
    assert limiting.limits_of(Principal(key="k", limits=Limits(None, None, None, None))) is usual


def test_money_goes_by_the_model_that_is_served() -> None:
    prices = {"fast": Price(1.0, 1.0), "big": Price(5.0, 5.0)}
    assert of_record(prices, ended(model="alias", served_model="big")) == prices["big"]
    assert of_record(prices, ended(model="fast", served_model="big")) == prices["fast"], "the alias has a price of its own"
    assert of_record(prices, ended(model="fast", served_model="big", fell_back=True)) == prices["big"]


def test_each_prompt_of_a_completion_is_reserved_an_answer() -> None:
    gateway = Gateway(limits=Limits(tokens=1000))
    body = {"prompt": ["a"] * 300, "max_tokens": 100}
    answer = gateway.done(gateway.post(json.dumps(body).encode(), "/v1/completions"))
    assert (answer.code, error_of(gateway, answer)["code"]) == (429, "rate_limit_exceeded")
    assert not gateway.agent.requests


def test_a_stream_that_never_began_costs_nothing() -> None:
    assert charged(ended(usage=Usage(0, 0, estimated=True)), BackendFailed("backend_protocol_error", "it ended")) == 0

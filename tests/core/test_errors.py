from __future__ import annotations

import json

import pytest

from gateway.core.errors import BACKENDS_DOING, CODES, MAX_RETRY_AFTER, GatewayError


@pytest.mark.parametrize("code", CODES)
def test_every_code_has_a_status_and_a_body_in_openais_form(code: str) -> None:
    error = GatewayError(code, "why")
    assert 400 <= error.status < 600
    assert json.loads(error.body()) == {"error": {"message": "why", "type": error.type, "param": None, "code": code}}
    assert error.fault in {"caller", "policy", "backend", "gateway"}


@pytest.mark.parametrize(
    ("wait", "expected"),
    [
        (0.0, {"Retry-After": "0", "Retry-After-Ms": "0"}),
        (0.2, {"Retry-After": "1", "Retry-After-Ms": "200"}),
        (7.1, {"Retry-After": "8"}),
        (9999.0, {"Retry-After": str(int(MAX_RETRY_AFTER))}),
        (-1.0, {"Retry-After": "0", "Retry-After-Ms": "0"}),
    ],
)
def test_retry_after_is_one_that_the_sdk_obeys(wait: float, expected: dict[str, str]) -> None:
    assert dict(GatewayError("draining", "x", retry_after=wait).headers()) == expected


def test_a_405_names_the_methods_that_are_allowed() -> None:
    assert GatewayError("method_not_allowed", "x", allow=("GET", "HEAD")).headers() == [("Allow", "GET, HEAD")]


def test_what_is_held_against_a_backend_is_all_that_it_does_wrong_but_the_total_timeout() -> None:
    assert {"backend_unreachable", "backend_error", "backend_protocol_error", "connect_timeout"} < BACKENDS_DOING
    assert {"first_byte_timeout", "idle_timeout"} <= BACKENDS_DOING
    assert len(BACKENDS_DOING) == 6

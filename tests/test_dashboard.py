from __future__ import annotations

import json
import re
from base64 import b64encode
from hashlib import sha256
from typing import Any, cast

import pytest
import treq
from twisted.internet.defer import Deferred, ensureDeferred
from twisted.web.server import Request

from gateway.core.api_keys import digest, parse_keys
from gateway.core.auth import Auth
from gateway.core.errors import BackendFailed, GatewayError
from gateway.dashboard import HEADERS, INTERVAL, PAGE, SOON, VIEWERS
from gateway.guard import Guard

from .fakes import HELLO, FakeResponse, Gateway, body_of, error_of, now_of

GONE = BackendFailed("backend_unreachable", "gone", detail="Connection refused")


class Viewer:
    """One who watches over HTTP, and what it has been sent."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._received: list[bytes] = []
        self.response = now_of(gateway.get("/dashboard/events"))
        self.ended: Deferred[Any] = treq.collect(self.response, self._received.append)

    @property
    def pictures(self) -> list[dict[str, Any]]:
        self._gateway.client.flush()
        *events, rest = b"".join(self._received).split(b"\n\n")
        assert rest == b""
        assert all(event.startswith(b"data: ") for event in events)
        return [json.loads(event[6:]) for event in events]


class FakeRequest:
    """A request whose connection a test fills, empties and closes."""

    def __init__(self) -> None:
        self.channel: object | None = object()
        self.producer: Any = None
        self.written: list[bytes] = []
        self.finished = False

    def setHeader(self, name: bytes, value: bytes) -> None:
        pass

    def registerProducer(self, producer: Any, streaming: bool) -> None:
        self.producer = producer

    def unregisterProducer(self) -> None:
        self.producer = None

    def write(self, data: bytes) -> None:
        self.written.append(data)

    def finish(self) -> None:
        self.finished = True


def watching(gateway: Gateway, request: FakeRequest) -> Deferred[None]:
    return ensureDeferred(gateway.dashboard.watch(cast(Request, request)))


def down(gateway: Gateway) -> None:
    """The gateway finds out that its backend has gone."""
    gateway.pool._unreachable("b", GONE)


# --- the page


def test_the_page_is_one_file_that_its_policy_lets_run_and_nothing_else() -> None:
    gateway = Gateway()
    response = now_of(gateway.get("/dashboard"))
    assert response.headers.getRawHeaders("content-type") == ["text/html; charset=utf-8"]
    (policy,) = response.headers.getRawHeaders("content-security-policy")
    page = body_of(gateway, response)
    assert page == PAGE
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert rules["default-src"] == "'none'"
    for element in ("script", "style"):
        (source,) = re.findall(rf"<{element}\b.*?>(.*?)</{element}>", page.decode(), re.DOTALL)
        assert rules[f"{element}-src"] == f"'sha256-{b64encode(sha256(source.encode()).digest()).decode()}'"
    assert "unsafe" not in policy
    assert b"\r\n" not in b"".join(HEADERS.values())


def test_the_page_asks_for_nothing_from_outside_and_makes_no_html_of_strings() -> None:
    page = PAGE.decode()
    assert set(re.findall(r"https?://[^'\"\s)]+", page)) == {"http://www.w3.org/2000/svg"}
    assert not re.findall(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function", page)
    body = page[page.index("<body>") : page.index("<script>")]
    assert not re.findall(r"\s(?:on\w+|style)=", body)


def test_where_admin_routes_are_off_there_is_no_dashboard() -> None:
    gateway = Gateway()
    gateway.app._admin = False
    for path in ("/dashboard", "/dashboard/state", "/dashboard/events"):
        response = now_of(gateway.get(path))
        assert (response.code, error_of(gateway, response)["code"]) == (404, "unknown_url")


def test_the_page_is_for_everybody_and_the_numbers_are_for_admins() -> None:
    gateway = Gateway()
    auth = Auth()
    table = '[[keys]]\nid = "{0}"\ntenant = "t"\nhash = "{1}"\nadmin = {2}\n'
    keys = "".join(table.format(id, digest(id.encode()).hex(), admin) for id, admin in (("boss", "true"), ("user", "false")))
    auth.use_keys(parse_keys("keys.toml", keys))
    gateway.app.answering.guard = Guard(auth, lambda: 0.0)
    assert now_of(gateway.get("/dashboard")).code == 200
    for path in ("/dashboard/state", "/dashboard/events"):
        assert now_of(gateway.get(path)).code == 401
        assert now_of(gateway.get(path, authorization="Bearer wrong")).code == 401
        assert now_of(gateway.get(path, authorization="Bearer user")).code == 403
        assert now_of(gateway.get(path, authorization="Bearer boss")).code == 200
    gateway.dashboard.stop()


# --- what it shows


def test_a_request_is_seen_with_its_backend_and_why() -> None:
    gateway = Gateway()
    response = gateway.post(HELLO, x_request_id="r1")
    gateway.clock.advance(0.25)
    gateway.agent.answer(
        FakeResponse(), json.dumps({"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 3}}).encode()
    )
    gateway.done(response)
    answer = now_of(gateway.get("/dashboard/state"))
    assert answer.headers.getRawHeaders("cache-control") == ["no-store"]
    state = json.loads(body_of(gateway, answer))
    (latest,) = state["latest"]
    assert (latest["id"], latest["backend"], latest["total"], latest["status"]) == ("r1", "b", 0.25, 200)
    assert latest["decision"]
    assert (latest["prompt_tokens"], latest["completion_tokens"]) == (7, 3)
    assert (state["counts"]["requests"], state["backends"][0]["window"]["requests"]) == (1, 1)
    assert state["backends"][0]["state"] == "healthy"


# --- the stream


def test_pictures_come_at_once_and_then_every_second() -> None:
    gateway = Gateway()
    viewer = Viewer(gateway)
    assert viewer.response.headers.getRawHeaders("content-type") == ["text/event-stream"]
    assert viewer.response.headers.getRawHeaders("x-accel-buffering") == ["no"]
    assert len(viewer.pictures) == 1
    gateway.clock.pump([INTERVAL] * 3)
    assert [round(one["uptime"]) for one in viewer.pictures] == [0, 1, 2, 3]
    gateway.dashboard.stop()


def test_a_backend_that_goes_down_is_shown_as_soon_as_the_gateway_knows() -> None:
    gateway = Gateway()
    viewer = Viewer(gateway)
    gateway.clock.advance(0.3)
    down(gateway)
    gateway.clock.advance(0)
    before, after = viewer.pictures
    assert (before["backends"][0]["state"], after["backends"][0]["state"]) == ("healthy", "unhealthy")
    assert "Connection refused" in after["backends"][0]["reason"]
    gateway.clock.advance(INTERVAL)
    assert len(viewer.pictures) == 3
    gateway.dashboard.stop()


def test_backends_that_change_all_the_time_do_not_make_a_flood() -> None:
    gateway = Gateway()
    viewer = Viewer(gateway)
    for _ in range(100):
        gateway.clock.advance(0.01)
        gateway.pool.drain("b")
        gateway.pool.undrain("b")
    assert len(viewer.pictures) <= 1 + 1.0 / SOON
    gateway.dashboard.stop()


def test_all_viewers_share_one_picture() -> None:
    gateway = Gateway()
    looks = 0
    look_up = gateway.dashboard._status

    def counted() -> Any:
        nonlocal looks
        looks += 1
        return look_up()

    gateway.dashboard._status = counted
    viewers = [Viewer(gateway) for _ in range(3)]
    gateway.clock.advance(INTERVAL)
    assert [len(viewer.pictures) for viewer in viewers] == [2, 2, 2]
    assert looks == 2
    gateway.dashboard.stop()


def test_a_viewer_that_does_not_read_is_skipped_and_gets_a_new_picture_when_it_does() -> None:
    gateway = Gateway()
    request = FakeRequest()
    watching(gateway, request)
    request.producer.pauseProducing()
    gateway.clock.pump([INTERVAL] * 50)
    assert len(request.written) == 1
    request.producer.resumeProducing()
    gateway.clock.advance(INTERVAL)
    assert len(request.written) == 2
    assert round(json.loads(request.written[-1][6:])["uptime"]) == 51
    gateway.dashboard.stop()


def test_nothing_is_made_while_nobody_watches() -> None:
    gateway = Gateway()
    assert not gateway.clock.getDelayedCalls()
    request = FakeRequest()
    watched = watching(gateway, request)
    assert gateway.clock.getDelayedCalls()
    request.channel = None  # as it is when the client has gone
    watched.cancel()
    now_of(watched)
    assert not request.finished
    assert not gateway.clock.getDelayedCalls()
    down(gateway)
    assert not gateway.clock.getDelayedCalls()


def test_there_is_a_bound_to_viewers_and_who_leaves_makes_room() -> None:
    gateway = Gateway()
    watched = [watching(gateway, FakeRequest()) for _ in range(VIEWERS)]
    response = now_of(gateway.get("/dashboard/events"))
    assert (response.code, error_of(gateway, response)["code"]) == (503, "too_many_viewers")
    watched[0].cancel()
    assert now_of(gateway.get("/dashboard/events")).code == 200
    gateway.dashboard.stop()


def test_a_drain_is_told_and_ends_every_stream() -> None:
    gateway = Gateway()
    viewers = [Viewer(gateway) for _ in range(2)]
    gateway.app.draining = True
    gateway.dashboard.stop()
    for viewer in viewers:
        assert [one["draining"] for one in viewer.pictures] == [False, True]
        now_of(viewer.ended)
    assert not gateway.clock.getDelayedCalls()
    now_of(gateway.app.answering.finished())
    with pytest.raises(GatewayError, match="shutting down"):
        now_of(watching(gateway, FakeRequest()))


def test_watching_is_recorded_as_a_request_that_was_answered() -> None:
    gateway = Gateway()
    Viewer(gateway)
    gateway.dashboard.stop()
    (record,) = gateway.records
    assert (record.route, record.status, record.code) == ("/dashboard/events", 200, "")

"""Seams of servers that are asked: what backends tell of themselves, and what Redis answers."""

from __future__ import annotations

from typing import Any, Final

import msgspec
from twisted.internet.defer import Deferred, succeed
from twisted.internet.error import ConnectionDone
from twisted.internet.testing import MemoryReactorClock, StringTransport
from twisted.python.failure import Failure

from gateway.core import error_forms
from gateway.core.errors import GatewayError
from gateway.core.principal import Budget, Limits
from gateway.core.readers import RedisServer
from gateway.core.reports import LOOKS, SIGNS, Parse, kind_of, window_of
from gateway.probe import retry_after
from gateway.redis_limiter import RedisLimiter

from .logged import no_failures
from .seams import Seam, packed

PARSERS: Final[tuple[Parse, ...]] = tuple(
    {parse: None for look in LOOKS.values() for _, parse in (*look.facts, *look.loads)} | {row[1]: None for row in SIGNS}
)
MOST: Final = 2**53
"""Numbers up to this are the same in everybody's JSON."""


def reports(data: bytes) -> None:
    """A page of a backend's gives numbers that can be, or none."""
    for parse in PARSERS:
        facts = parse(data)
        if facts is None:
            continue
        for number in (facts.slots, facts.kv_tokens, facts.context, facts.running, facts.waiting):
            assert number is None or 0 <= number <= MOST
        assert facts.kv_usage is None or 0 <= facts.kv_usage <= 1
        msgspec.json.decode(msgspec.json.encode(facts._asdict()))


def entries(data: bytes) -> None:
    """An entry of a list of models, and what a server calls itself."""
    try:
        entry = msgspec.json.decode(data, type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        entry = {}
    kind_of(data, [entry])
    window = window_of(entry)
    assert window is None or 0 < window <= MOST


def refusals(data: bytes) -> None:
    """A backend's own words on what went wrong, and when to come again."""
    wait = retry_after([(b"Retry-After", data)])
    assert wait is None or 0 <= wait < 100_000
    assert isinstance(error_forms.said(data), str)
    event = error_forms.response_event(data)
    assert event.endswith(b"\n\n")
    assert len(event) <= 8 * len(data) + 200


# --- Redis

TIMEOUT: Final = 0.5
_SERVER: Final = RedisServer(False, "127.0.0.1", 6379, None, None, 0)
_LIMITS: Final = Limits(10, 1000, 5, Budget(amount=1000, unit="tokens", period="day"))


class _Server:
    """Connects at once, to whom says what it is told to say."""

    def __init__(self, clock: Any) -> None:
        self._clock = clock
        self.connections: list[Any] = []

    def connect(self, factory: Any) -> Deferred[Any]:
        protocol = factory.buildProtocol(None)
        protocol.callLater = self._clock.callLater
        protocol.makeConnection(StringTransport())
        self.connections.append(protocol)
        return succeed(protocol)

    def say(self, data: bytes) -> None:
        """As a transport hands it over: what a protocol raises ends its connection."""
        for at in range(0, len(data), 16):
            connection = self.connections[-1]
            self.lose_closed()
            if connection not in self.connections:
                return
            try:
                connection.dataReceived(data[at : at + 16])
            except Exception:
                self.lose(connection)
                return

    def lose_closed(self) -> None:
        for one in list(self.connections):
            if one.transport.disconnecting or one.transport.disconnected:
                self.lose(one)

    def lose(self, connection: Any) -> None:
        self.connections.remove(connection)
        connection.connectionLost(Failure(ConnectionDone()))

    def wait(self) -> None:
        """Longer than an answer may take."""
        self._clock.advance(TIMEOUT + 0.1)
        self.lose_closed()


def redis(data: bytes) -> None:
    """Whatever Redis answers to a request, the request is let in or refused in words, in time; nothing fails in silence, and
    all timers end with the limiter."""
    with no_failures():
        clock = MemoryReactorClock()
        server = _Server(clock)
        limiter = RedisLimiter(
            _SERVER, clock, lambda: 1_700_000_000.0 + clock.seconds(), TIMEOUT, fail_open=bool(len(data) & 1)
        )
        limiter._link._endpoint = server
        limiter.start()
        server.say(b"+OK\r\n" * 3)
        outcomes: list[Any] = []
        asked = limiter.reserve("k", _LIMITS, 10, 0)
        assert isinstance(asked, Deferred)
        asked.addBoth(outcomes.append)
        server.say(data)
        server.wait()
        [outcome] = outcomes
        if isinstance(outcome, Failure):
            assert outcome.check(GatewayError), outcome.getTraceback()
        else:
            outcome.settle(5, 0, clock.seconds())
            outcome.end()
        server.wait()
        server.wait()
        limiter.stop()
        server.lose_closed()
        assert not server.connections
        assert not clock.getDelayedCalls()


_METRICS: Final = (
    b'vllm:num_requests_running{engine="0"} 3.0\nvllm:num_requests_waiting 7\nvllm:kv_cache_usage_perc 0.5\n'
    b'vllm:cache_config_info{block_size="16",num_gpu_blocks="100"} 1.0\nprocess_start_time_seconds 1.7e9\n'
)
_BIG: Final = b"tgi_batch_current_size 1e308\ntgi_batch_current_size 1e308\ntgi_queue_size -5\n"
_PAGES: Final = packed(
    {"total_slots": 4, "default_generation_settings": {"n_ctx": 4096}, "version": "1"},
    {"max_total_num_tokens": 5, "dp_size": 2, "internal_states": [{"effective_max_running_requests_per_dp": 4}]},
    {"max_concurrent_requests": 4, "max_batch_total_tokens": 10, "model_id": "m"},
    {"loads": [{"num_running_reqs": 1, "num_waiting_reqs": 2, "token_usage": 0.5}]},
)
_LISTS: Final = packed([{"is_processing": True}], [{"num_reqs": 3, "num_waiting_reqs": 1}])
_COUNTS: Final = b":1\r\n:1700000000\r\n:1\r\n:2\r\n:1\r\n:3\r\n:1700000000\r\n"
_REPLIES: Final = [
    b"*7\r\n" + _COUNTS,
    b"*7\r\n:0\r\n" + _COUNTS[4:],
    b"*8\r\n:1\r\n" + _COUNTS,
    b"*7\r\n" + _COUNTS.replace(b":2\r\n", b"$-1\r\n"),
    b"*7\r\n" + _COUNTS.replace(b":2\r\n", b"+two\r\n"),
    b"*7\r\n" + _COUNTS.replace(b":2\r\n", b":" + b"9" * 400 + b"\r\n"),
    b"*7\r\n" + _COUNTS.replace(b":2\r\n", b":-5\r\n"),
    b"*2\r\n:1\r\n:2\r\n",
    b"*0\r\n",
    b"*-1\r\n",
    b"$-1\r\n",
    b":1\r\n",
    b"+OK\r\n",
    b"$5\r\nhello\r\n",
    b"-ERR no\r\n",
    b"-NOSCRIPT no\r\n-NOSCRIPT no\r\n-NOSCRIPT no\r\n",
    b"*1\r\n*1\r\n*1\r\n:1\r\n",
    b"*99999999999\r\n:1\r\n",
    b"$99999999999\r\nx",
    b"*x\r\n",
    b"$x\r\n",
    b":x\r\n",
    b"%1\r\n",
    b"HTTP/1.1 400 Bad Request\r\n\r\n",
    b"",
]

SEAMS: Final = {
    "reports": Seam(reports, [*_PAGES, *_LISTS, _METRICS, _BIG]),
    "entries": Seam(entries, packed({"id": "m", "owned_by": "vllm", "max_model_len": 4096})),
    "refusals": Seam(refusals, [*packed({"error": {"message": "m", "code": "c"}}, {"detail": "d"}), b"12", b"soon"]),
    "redis": Seam(redis, _REPLIES),
}

from __future__ import annotations

import os
import socket
from contextlib import suppress

import pytest
from twisted.internet.task import Clock

from gateway.inherited import NOTHING, VARIABLE, Inherited, _places, inherit
from gateway.notify import PULSE, Pulse


def test_what_is_handed_over_is_taken_from_the_environment() -> None:
    given = Inherited({"http": 6}, ready=3, starter=4, worker=1, workers=2)
    environ = {VARIABLE: given.shown(), "HOME": "/"}
    assert inherit(environ, Clock()) == given
    assert environ == {"HOME": "/"}


def test_names_for_another_process_hand_nothing_over() -> None:
    assert inherit({"LISTEN_FDNAMES": "http"}, Clock()) is NOTHING


def test_a_worker_whose_parent_is_gone_goes_on_to_see_it() -> None:
    """It is told of that by the end of another pipe, which it looks at only after this."""
    read, write = os.pipe()
    os.close(read)
    Inherited(ready=write).tell_ready()
    with pytest.raises(OSError, match="Bad file"):
        os.close(write)


def test_a_worker_keeps_the_pipe_for_its_signs_of_life() -> None:
    read, write = os.pipe()
    Inherited(ready=write, worker=0).tell_ready()
    clock = Clock()
    pulse = Pulse(write, clock)
    pulse.startService()
    clock.advance(PULSE)
    assert os.read(read, 99) == b"READY=1\n.."
    os.set_blocking(write, False)
    with suppress(BlockingIOError):
        while True:
            os.write(write, b"x" * 4096)
    clock.advance(PULSE)  # nobody reads: it goes on
    os.close(read)
    clock.advance(PULSE)
    pulse.stopService()
    assert not clock.getDelayedCalls()
    with pytest.raises(OSError, match="Bad file"):
        os.close(write)


@pytest.mark.parametrize(
    ("names", "places"),
    [
        (["http"], ["http"]),
        (["gateway.socket"], ["http"]),
        (["a", "b"], ["http", "admin"]),
        (["admin", "a"], ["admin", "http"]),
        (["http", "http"], None),
        (["a", "b", "c"], None),
    ],
)
def test_each_socket_of_systemd_has_one_place(names: list[str], places: list[str] | None) -> None:
    sockets = [socket.socket() for _ in names]
    numbers = [one.fileno() for one in sockets]
    try:
        if places is None:
            with pytest.raises(ValueError, match="FileDescriptorName"):
                _places(numbers, names)
        else:
            assert _places(numbers, names) == dict(zip(places, numbers, strict=True))
    finally:
        for one in sockets:
            one.close()

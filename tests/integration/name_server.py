"""A name server whose records a test changes: UDP and TCP on one port, in threads; the messages are twisted's."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from twisted.names import dns


class NameServer:
    """``records`` are those of a name. A name that has none does not exist, unless ``code`` says something else; ``silent``: it
    does not answer."""

    def __init__(self) -> None:
        self.records: dict[str, list[Any]] = {}
        self.ttl = 1
        self.code = dns.OK
        self.silent = False
        self.asked: list[tuple[str, str]] = []
        self._tcp = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._tcp.getsockname()[1]
        self._udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._udp.bind(("127.0.0.1", self.port))
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._answer_udp, self._answer_tcp)]
        for thread in self._threads:
            thread.start()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def _answer_udp(self) -> None:
        with suppress(OSError):
            while True:
                question, client = self._udp.recvfrom(4096)
                if not question:
                    return  # it has been shut down
                answer = self._answer(question, "udp", 512)
                if answer:
                    self._udp.sendto(answer, client)

    def _answer_tcp(self) -> None:
        with suppress(OSError):
            while True:
                connection = self._tcp.accept()[0]
                with connection, suppress(OSError, struct.error):
                    (length,) = struct.unpack("!H", connection.recv(2, socket.MSG_WAITALL))
                    answer = self._answer(connection.recv(length, socket.MSG_WAITALL), "tcp", 0)
                    connection.sendall(struct.pack("!H", len(answer)) + answer)

    def _answer(self, question: bytes, way: str, most: int) -> bytes:
        """``most`` bytes, or as many as there are."""
        asked = dns.Message()
        asked.fromStr(question)
        query = asked.queries[0]
        name = query.name.name.decode().lower()
        self.asked.append((name, way))
        if self.silent:
            return b""
        answer = dns.Message(id=asked.id, answer=1, recAv=1, maxSize=most)
        answer.queries = asked.queries
        known = self.records.get(name)
        answer.rCode = dns.ENAME if known is None and self.code == dns.OK else self.code
        if answer.rCode == dns.OK:
            answer.answers = [
                dns.RRHeader(name, one.TYPE, ttl=self.ttl, payload=one) for one in known or [] if query.type == one.TYPE
            ]
        return bytes(answer.toStr())

    def stop(self) -> None:
        self._tcp.shutdown(socket.SHUT_RDWR)
        self._tcp.close()
        with suppress(OSError):
            self._udp.shutdown(socket.SHUT_RDWR)
        self._udp.close()
        for thread in self._threads:
            thread.join(5)


@contextmanager
def name_server() -> Iterator[NameServer]:
    """One for the length of a block."""
    running = NameServer()
    try:
        yield running
    finally:
        running.stop()

"""As much of a Kubernetes API server as the endpoints of a service need: lists, and watches as chunked JSON lines with
versions, bookmarks, and 410 for what is too long ago."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

TOKEN = "a-token-of-the-tests"


class KubernetesAPI:
    """One service's slices, which a test changes. ``status`` other than 200 is what everybody is told."""

    def __init__(self, namespace: str = "default", service: str = "vllm") -> None:
        self.path = f"/apis/discovery.k8s.io/v1/namespaces/{namespace}/endpointslices"
        self.selector = f"kubernetes.io/service-name={service}"
        self.status = 200
        self.lists = self.watches = 0
        self.problems: list[str] = []
        self.watching = 0
        self._slices: dict[str, Mapping[str, Any]] = {}
        self._events: list[tuple[int, Mapping[str, Any]]] = []
        self._version = 100
        self._oldest = 100
        self._cuts = 0
        self._changed = threading.Condition()
        api = self

        class Answering(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                with suppress(OSError):
                    api._answer(self)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Answering)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=[0.05])
        self._thread.start()

    # --- what a test does

    def put(self, name: str, *endpoints: Mapping[str, Any], ports: Mapping[str, int], family: str = "IPv4") -> None:
        """This slice is there now, with these endpoints."""
        with self._changed:
            kind = "MODIFIED" if name in self._slices else "ADDED"
            self._version += 1
            self._slices[name] = {
                "apiVersion": "discovery.k8s.io/v1",
                "kind": "EndpointSlice",
                "metadata": {"name": name, "namespace": "default", "resourceVersion": str(self._version)},
                "addressType": family,
                "endpoints": list(endpoints),
                "ports": [{"name": port, "port": number, "protocol": "TCP"} for port, number in ports.items()],
            }
            self._say(kind, self._slices[name])

    def delete(self, name: str) -> None:
        with self._changed:
            self._version += 1
            gone = self._slices.pop(name)
            self._say("DELETED", {**gone, "metadata": {**gone["metadata"], "resourceVersion": str(self._version)}})

    def bookmark(self) -> None:
        """Whoever watches is told how far it is, and what was before is forgotten."""
        with self._changed:
            self._version += 1
            metadata = {"resourceVersion": str(self._version), "creationTimestamp": None}
            self._say("BOOKMARK", {"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "metadata": metadata})
            self._oldest = self._version

    def forget(self) -> None:
        """All that has happened is too long ago for who asks."""
        with self._changed:
            self._version += 1
            self._oldest = self._version
            self._cuts += 1
            self._changed.notify_all()

    def cut(self) -> None:
        """Every watch ends."""
        with self._changed:
            self._cuts += 1
            self._changed.notify_all()

    def _say(self, kind: str, thing: Mapping[str, Any]) -> None:
        self._events.append((self._version, {"type": kind, "object": thing}))
        self._changed.notify_all()

    # --- what it answers

    def _answer(self, request: BaseHTTPRequestHandler) -> None:
        url = urlsplit(request.path)
        query = dict(parse_qsl(url.query))
        if self.status != 200:
            self._send(request, self.status, {"kind": "Status", "code": self.status})
        elif request.headers["Authorization"] != f"Bearer {TOKEN}":
            self._send(request, 401, {"kind": "Status", "code": 401})
        elif url.path != self.path or query.get("labelSelector") != self.selector:
            self.problems.append(request.path)
            self._send(request, 404, {"kind": "Status", "code": 404})
        elif query.get("watch", "").lower() == "true":
            self.watches += 1
            self._watch(request, int(query["resourceVersion"]), float(query["timeoutSeconds"]))
        else:
            self.lists += 1
            with self._changed:
                listing = {"kind": "EndpointSliceList", "metadata": {"resourceVersion": str(self._version)}}
                self._send(request, 200, {**listing, "items": list(self._slices.values())})

    @staticmethod
    def _send(request: BaseHTTPRequestHandler, status: int, body: Mapping[str, Any]) -> None:
        content = json.dumps(body).encode()
        request.send_response(status)
        request.send_header("Content-Type", "application/json")
        request.send_header("Content-Length", str(len(content)))
        request.end_headers()
        request.wfile.write(content)

    def _watch(self, request: BaseHTTPRequestHandler, version: int, seconds: float) -> None:
        request.send_response(200)
        request.send_header("Content-Type", "application/json")
        request.send_header("Transfer-Encoding", "chunked")
        request.end_headers()
        with self._changed:
            cuts, too_old = self._cuts, version < self._oldest
            self.watching += 1
        try:
            if too_old:
                gone = {"kind": "Status", "code": 410, "reason": "Expired", "message": "too old resource version"}
                self._chunk(request, {"type": "ERROR", "object": gone})
            while not too_old:
                with self._changed:
                    due = [event for at, event in self._events if at > version]
                    version = max([at for at, _ in self._events], default=version) if due else version
                    if not due and (self._cuts != cuts or not self._changed.wait(seconds)):
                        break
                for event in due:
                    self._chunk(request, event)
            request.wfile.write(b"0\r\n\r\n")
        finally:
            with self._changed:
                self.watching -= 1

    @staticmethod
    def _chunk(request: BaseHTTPRequestHandler, event: Mapping[str, Any]) -> None:
        line = json.dumps(event).encode() + b"\n"
        half = len(line) // 2  # a line may come in pieces
        for piece in (line[:half], line[half:]):
            request.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece))

    # --- its life

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def kubeconfig(self, directory: Path) -> str:
        """The path of a file with which a client finds it."""
        path = directory / "kubeconfig"
        found = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "c", "cluster": {"server": self.url}}],
            "users": [{"name": "u", "user": {"token": TOKEN}}],
            "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
            "current-context": "x",
        }
        path.write_text(json.dumps(found))
        return str(path)

    def stop(self) -> None:
        self.cut()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(5)
        assert not self.problems, self.problems


@contextmanager
def kubernetes_api() -> Iterator[KubernetesAPI]:
    """One for the length of a block."""
    running = KubernetesAPI()
    try:
        yield running
    finally:
        running.stop()


def endpoint(address: str, **conditions: bool) -> dict[str, Any]:
    return {"addresses": [address], "conditions": {"ready": True, "serving": True, "terminating": False, **conditions}}

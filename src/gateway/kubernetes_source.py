"""Backends that Kubernetes has: the endpoints of a service, listed and then watched, in a thread, with its own client library.

The watch begins where the list ended, and goes on where it was when it has ended by itself. When that is too long ago for
the API server (410 Gone), all are listed anew. What was found stays while the API server is away.
"""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Callable
from typing import Any, Final

from kubernetes import client, config, watch
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IDelayedCall
from twisted.logger import Logger
from urllib3.exceptions import HTTPError

from .core.endpoint_slices import Slices
from .core.readers import SettingsError
from .core.sources import SourceURL
from .discovery import Failed, Found, wait_after

WATCH_SECONDS: Final = 60
"""One watch; the API server ends it, and the next one goes on."""

CONNECT_SECONDS: Final = 5.0
SPARE_SECONDS: Final = 10.0
"""A watch that has not ended by so much later has lost its server."""

FIRST_WAIT: Final = 0.5
"""Seconds until it is tried again, at first."""

INTERRUPT_SECONDS: Final = 0.1
GONE: Final = 410

_log: Final = Logger("gateway.discovery")


def api_of(source: str) -> client.DiscoveryV1Api:
    """The API of the cluster that this process is in, or else of the kubeconfig. Raises `SettingsError`."""
    configuration = client.Configuration()
    try:
        try:
            config.load_incluster_config(client_configuration=configuration)
        except config.ConfigException:
            config.load_kube_config(client_configuration=configuration)
    except (config.ConfigException, OSError) as problem:
        why = "this is no pod with a service account, and there is no kubeconfig that can be used"
        raise SettingsError(f"{source}: {why}: {str(problem)[:200]}") from None
    return client.DiscoveryV1Api(client.ApiClient(configuration))


class KubernetesSource:
    """Looks for the endpoints of ``url``, whose kind is k8s."""

    def __init__(
        self,
        url: SourceURL,
        api: client.DiscoveryV1Api,
        reactor: Any,
        found: Found,
        failed: Failed,
        random: Callable[[], float] = random.random,
    ) -> None:
        self._service, self._namespace = url.host.split(".")
        self._api = api
        self._reactor = reactor
        self._found = found
        self._failed = failed
        self._random = random
        self._slices = Slices(url.port)
        self._stopping = threading.Event()
        self._ended: Deferred[None] = Deferred()
        self._interrupting: IDelayedCall | None = None
        self._watch = watch.Watch(return_type="object")
        self._thread = threading.Thread(target=self._run, name=f"endpoints of {url.host}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> Deferred[None]:
        self._stopping.set()
        if self._thread.ident is None:
            self._ended.callback(None)
        else:
            self._interrupt()
        return self._ended

    def _interrupt(self) -> None:
        """The watch ends at once; again and again, as a new one may just have begun."""
        self._watch.stop()
        self._interrupting = self._reactor.callLater(INTERRUPT_SECONDS, self._interrupt)

    def _has_ended(self) -> None:
        if self._interrupting is not None:
            self._interrupting.cancel()
        self._ended.callback(None)

    def _tell(self, what: Callable[..., object], *values: object) -> None:
        """In the reactor's thread, unless it is too late."""
        self._reactor.callFromThread(lambda: None if self._stopping.is_set() else what(*values))

    # --- in the thread

    def _run(self) -> None:
        version, failures = "", 0
        while not self._stopping.is_set():
            try:
                if version:
                    version = self._follow(version)
                    failures = 0
                else:
                    version = self._list()
            except Exception as problem:  # whatever it is, the next try may go better
                version = ""
                gone = getattr(problem, "status", 0) == GONE
                if not gone:
                    self._tell(self._failed, _why(problem))
                if failures or not gone:
                    self._stopping.wait(wait_after(failures, FIRST_WAIT, self._random()))
                failures += 1
        self._reactor.callFromThread(self._has_ended)

    def _list(self) -> str:
        """All slices; returns their version, from which the watch goes on."""
        answer: Any = self._api.list_namespaced_endpoint_slice(
            self._namespace,
            label_selector=f"kubernetes.io/service-name={self._service}",
            _request_timeout=(CONNECT_SECONDS, SPARE_SECONDS),
            _preload_content=False,
        )
        if answer.status != 200:
            raise client.ApiException(http_resp=answer)
        found = json.loads(answer.data)
        self._slices.replace(found["items"])
        self._tell(self._found, self._slices.endpoints())
        return str(found["metadata"]["resourceVersion"])

    def _follow(self, version: str) -> str:
        """Watch until the server ends it; returns the version to go on from."""
        events = self._watch.stream(
            self._api.list_namespaced_endpoint_slice,
            self._namespace,
            label_selector=f"kubernetes.io/service-name={self._service}",
            resource_version=version,
            allow_watch_bookmarks=True,
            timeout_seconds=WATCH_SECONDS,
            _request_timeout=(CONNECT_SECONDS, WATCH_SECONDS + SPARE_SECONDS),
        )
        for event in events:
            if self._stopping.is_set():
                break
            if event["type"] != "BOOKMARK":
                self._slices.change(event["type"], event["object"])
                self._tell(self._found, self._slices.endpoints())
        return str(self._watch.resource_version)


def _why(problem: Exception) -> str:
    """In a few words, without what a server has sent."""
    if isinstance(problem, client.ApiException):
        return f"the API server answered with status {problem.status} {problem.reason}"[:200]
    if isinstance(problem, HTTPError):
        return f"the API server cannot be reached ({type(problem).__name__})"
    return f"the API server's answer is not in its form ({type(problem).__name__})"

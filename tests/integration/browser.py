"""A real Chromium, driven over WebDriver (https://www.w3.org/TR/webdriver2/), which is JSON over HTTP and needs no library.

Debian packages chromium and its chromedriver together, so that the two always fit.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from ..conftest import cannot_run
from .processes import PATIENCE, free_port, wait_for

ELEMENT = "element-6066-11e4-a52e-4f735466cecf"
TAB, ENTER = "\ue004", "\ue007"


def _call(method: str, url: str, body: Any = None) -> Any:
    sent = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, sent, {"Content-Type": "application/json"}, method=method)
    try:
        with urllib.request.urlopen(request, timeout=2 * PATIENCE) as response:
            return json.load(response)["value"]
    except urllib.error.HTTPError as error:
        with error:
            raise AssertionError(json.load(error)["value"]["message"]) from None


class Browser:
    """One window."""

    def __init__(self, session: str) -> None:
        self._session = session

    def _post(self, path: str, **body: Any) -> Any:
        return _call("POST", f"{self._session}{path}", body)

    def open(self, url: str) -> None:
        self._post("/url", url=url)

    def run(self, script: str, *arguments: Any) -> Any:
        """What a function with this body returns in the page."""
        return self._post("/execute/sync", script=script, args=arguments)

    def wait(self, script: str, *arguments: Any) -> Any:
        """The same, once it is true."""
        return wait_for(lambda: self.run(script, *arguments))

    def text(self, selector: str) -> str:
        """What is written in the first such element."""
        found: str = self.run("return document.querySelector(arguments[0]).innerText", selector)
        return found

    def press(self, keys: str) -> None:
        """Type on the keyboard, wherever the focus is."""
        actions = [{"type": kind, "value": one} for one in keys for kind in ("keyDown", "keyUp")]
        self._post("/actions", actions=[{"type": "key", "id": "keyboard", "actions": actions}])

    def focused(self) -> str:
        """What has the focus: an id, or else a tag."""
        found: str = self.run("const at = document.activeElement; return at.id || at.tagName.toLowerCase()")
        return found

    def devtools(self, command: str, **parameters: Any) -> Any:
        """A command of Chromium's own (https://chromedevtools.github.io/devtools-protocol/)."""
        return self._post("/goog/cdp/execute", cmd=command, params=parameters)

    def look(self, width: int, scheme: Literal["light", "dark"], height: int = 900) -> None:
        """The window has this size, and its user likes this scheme of colours."""
        self.devtools("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.devtools("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def console(self) -> list[str]:
        """What the page has complained of since this was asked last."""
        return [entry["message"] for entry in self._post("/se/log", type="browser")]

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(_call("GET", f"{self._session}/screenshot")))


@contextmanager
def chromium(directory: Path) -> Iterator[Browser]:
    """A browser without a screen. Skips where there is none."""
    driver = shutil.which("chromedriver")
    if driver is None or shutil.which("chromium") is None:
        cannot_run("no Chromium", "apt-get install chromium chromium-driver")
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    with (directory / "chromedriver.log").open("wb") as log:
        process = subprocess.Popen([driver, f"--port={port}"], stdout=log, stderr=log)
    try:
        wait_for(lambda: _is_ready(address))
        arguments = ["--headless=new", "--disable-gpu", "--disable-dev-shm-usage", f"--user-data-dir={directory / 'profile'}"]
        arguments += ["--no-sandbox"] if os.geteuid() == 0 else []
        options = {"args": arguments, "binary": shutil.which("chromium")}
        wanted = {"browserName": "chrome", "goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        made = _call("POST", f"{address}/session", {"capabilities": {"alwaysMatch": wanted}})
        session = f"{address}/session/{made['sessionId']}"
        try:
            yield Browser(session)
        finally:
            _call("DELETE", session)
    finally:
        process.terminate()
        process.wait(PATIENCE)


def _is_ready(address: str) -> bool:
    try:
        return bool(_call("GET", f"{address}/status")["ready"])
    except OSError:
        return False

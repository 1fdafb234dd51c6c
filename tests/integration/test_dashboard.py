"""The dashboard in a real browser, before a real gateway with backends that come and go."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal

import pytest

from gateway.dashboard import HEADERS, PAGE, VIEWERS

from .asking import HELLO, answers, ask, streams, table, until
from .backends import ScriptedBackend, backend
from .browser import ENTER, TAB, Browser, chromium
from .processes import PATIENCE, Running, clean_environment, wait_for

IMG = "<img src=x onerror=document.title='hacked'>"
HOSTILE = [IMG, "m" * 10_000, "\u202egpj.exe", "'\"><script>document.title='hacked'</script>", "\x1b[31mred"]
FITS = "return document.documentElement.scrollWidth <= document.documentElement.clientWidth"
STATES = "return [...document.querySelectorAll('#backends .badge')].map(one => one.textContent)"
LIVE = "return document.getElementById('link').textContent === 'live'"


@pytest.fixture(scope="module")
def window(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with chromium(tmp_path_factory.mktemp("chromium")) as browser:
        yield browser


@pytest.fixture
def browser(window: Browser) -> Iterator[Browser]:
    """A window that nobody has used; its page must not have complained of anything but a missing or wrong key."""
    window.open("about:blank")
    window.console()
    window.look(1200, "light")
    yield window
    complaints = [line for line in window.console() if "401 (Unauthorized)" not in line and "403 (Forbidden)" not in line]
    window.open("about:blank")
    assert not complaints


@contextmanager
def gateway_of(directory: Path, *backends: ScriptedBackend, **more: str) -> Iterator[Running]:
    """A gateway that looks at its backends every tenth of a second; they are named b0, b1 and so on."""
    config = directory / "gateway.toml"
    config.write_text("".join(table(f"b{place}", one.url) for place, one in enumerate(backends)))
    options = {"GATEWAY_PROBE_INTERVAL": "0.1s", "GATEWAY_PROBE_DOWN": "1", **more}
    with Running(directory, "--config", str(config), **options) as gateway:
        until(gateway, "healthy", *[f"b{place}" for place in range(len(backends))])
        yield gateway


def opened(browser: Browser, gateway: Running) -> None:
    browser.open(f"{gateway.url}/dashboard")
    browser.wait(LIVE)


@contextmanager
def stopping(running: ScriptedBackend) -> Iterator[ScriptedBackend]:
    """For a backend that the test stops by itself."""
    try:
        yield running
    finally:
        assert not running.problems


def gone(one: ScriptedBackend) -> None:
    """Nobody listens there any more, and what was open is closed."""
    one.stop()
    one._accepting.join(PATIENCE)  # it may have accepted one more
    for connection in one.connections:
        connection.close()


def test_it_shows_what_happens_while_it_happens(tmp_path: Path, browser: Browser) -> None:
    with backend(streams("a", "b")) as one, gateway_of(tmp_path, one) as gateway:
        opened(browser, gateway)
        assert "None since the gateway started." in browser.text("#latest-empty")
        assert browser.run(STATES) == ["healthy"]
        assert ask(gateway, {**HELLO, "stream": True}, X_Request_ID="first-of-all").status == 200
        browser.wait("return document.querySelector('#latest').innerText.includes('first-of-all')")
        row = browser.text("#latest tbody tr")
        assert "b0" in row
        assert "200" in row
        assert re.search(r"\d ms", row)
        assert "/v1/chat/completions, streamed" in row
        assert "first-of-all" in browser.text("#slowest")
        # a curve begins once a bucket is full
        browser.wait("return document.querySelectorAll('#tiles path[d*=h]').length > 0")


def test_a_backend_that_goes_down_is_shown_within_a_second_of_the_gateways_knowing(tmp_path: Path, browser: Browser) -> None:
    """Of three that go one after the other, one is enough: the machine may be busy."""
    doomed = [ScriptedBackend(answers) for _ in range(3)]
    with backend(answers) as one, gateway_of(tmp_path, one, *doomed) as gateway:
        opened(browser, gateway)
        browser.run(
            """window.seenAt = [];
               new MutationObserver(() => {
                 const down = [...document.querySelectorAll('#backends .badge')].filter(one => one.textContent === 'unhealthy');
                 while (window.seenAt.length < down.length) window.seenAt.push(Date.now() / 1000);
               }).observe(document.querySelector('#backends'), {subtree: true, childList: true, characterData: true})"""
        )
        for number, two in enumerate(doomed, 1):
            gone(two)
            browser.wait("return window.seenAt.length === arguments[0]", number)
        assert browser.run(STATES) == ["healthy", "unhealthy", "unhealthy", "unhealthy"]
        assert browser.run("return document.title") == "(3 down) Inference Gateway"
        browser.wait("return document.querySelector('#changes').innerText.includes('b1 is')")
        assert browser.run("return document.querySelector('#changes').getAttribute('aria-live')") == "polite"
        lines = [line for line in gateway.lines().splitlines() if "is unhealthy" in line]
        known = [datetime.fromisoformat(line.split(" ")[0]).timestamp() for line in lines]
        delays = [shown - knew for shown, knew in zip(browser.run("return window.seenAt"), known, strict=True)]
        assert min(delays) < 1.0, delays
    assert not [problem for two in doomed for problem in two.problems]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [320, 400, 700, 1024, 1600])
def test_it_fits_every_width_in_both_schemes(
    tmp_path: Path, browser: Browser, full: Running, width: int, scheme: Literal["light", "dark"]
) -> None:
    browser.look(width, scheme)
    opened(browser, full)
    browser.wait("return document.querySelectorAll('#latest tbody tr').length > 4")
    assert browser.run(FITS)
    low = browser.run(CONTRAST)
    assert low == []
    assert browser.run("return getComputedStyle(document.body).backgroundColor") == (
        "rgb(244, 246, 248)" if scheme == "light" else "rgb(13, 16, 21)"
    )


CONTRAST = """
const light = (text) => {
  const linear = (n) => n <= .03928 ? n / 12.92 : ((n + .055) / 1.055) ** 2.4;
  const [r, g, b] = text.match(/[\\d.]+/g).map((n) => linear(n / 255));
  return .2126 * r + .7152 * g + .0722 * b;
};
const behind = (node) => {
  for (; node; node = node.parentElement) {
    const colour = getComputedStyle(node).backgroundColor;
    if (colour !== 'rgba(0, 0, 0, 0)') return colour;
  }
  return 'rgb(255, 255, 255)';
};
const low = [];
for (const node of document.querySelectorAll('body *')) {
  if (![...node.childNodes].some((one) => one.nodeType === 3 && one.data.trim()) || !node.offsetParent) continue;
  const pair = [light(getComputedStyle(node).color), light(behind(node))].sort((a, b) => b - a);
  const contrast = (pair[0] + .05) / (pair[1] + .05);
  if (contrast < 4.5) low.push([node.tagName, node.className, node.textContent.slice(0, 30), contrast.toFixed(2)]);
}
return low;
"""
"""What has less contrast than WCAG 2.2 asks for (1.4.3, level AA), as it is seen."""


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A gateway with every state, hostile names, and errors to show."""
    directory = tmp_path_factory.mktemp("full")
    with backend(streams("a", "b")) as one, backend(answers) as two, stopping(ScriptedBackend(answers)) as three:
        with gateway_of(directory, one, two, three) as gateway:
            assert ask(gateway, {"draining": True}, "/admin/backends/b1").status == 200
            gone(three)
            until(gateway, "unhealthy", "b2")
            for model in HOSTILE:
                assert ask(gateway, {**HELLO, "model": model}).status == 404
            for number in range(4):
                assert ask(gateway, {**HELLO, "stream": True}, X_Request_ID=f"{number}-{IMG.replace(' ', '_')}").status == 200
            yield gateway


def test_hostile_names_do_nothing(browser: Browser, full: Running) -> None:
    opened(browser, full)
    browser.wait("return document.querySelectorAll('#latest tbody tr').length > 8")
    seen = browser.run("return [...document.querySelectorAll('#latest td[data-label=Model] bdi')].map(one => one.textContent)")
    assert IMG in seen
    assert "m" * 96 + "\u2026" in seen
    assert "\ufffdgpj.exe" in seen
    assert "\ufffd[31mred" in seen
    assert browser.run("return document.querySelectorAll('img, main script, iframe, object').length") == 0
    assert browser.run("return document.title") == "(1 down) Inference Gateway"
    assert browser.run(FITS)
    # even a script that got in would not run
    browser.run(
        """const script = document.createElement('script');
           try { script.text = "document.title = 'hacked'"; document.body.append(script); } catch (refused) { }"""
    )
    assert browser.run("return document.title") == "(1 down) Inference Gateway"
    assert any("Trusted" in line or "Content Security Policy" in line for line in browser.console())


class Liar(BaseHTTPRequestHandler):
    """A gateway that replaces nothing in what it was told, and whose words are all hostile."""

    picture: object = None

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("content-type", "text/html" if self.path == "/dashboard" else "text/event-stream")
        for name, value in HEADERS.items():
            self.send_header(name.decode(), value.decode())
        self.end_headers()
        if self.path == "/dashboard":
            self.wfile.write(PAGE)
        else:
            self.wfile.write(b"data: " + json.dumps(self.picture).encode() + b"\n\n")

    def log_message(self, format: str, *args: object) -> None:
        pass


def lied(value: Any, lie: str) -> Any:
    """The same, with each text replaced."""
    if isinstance(value, dict):
        return {name: lied(one, lie) for name, one in value.items()}
    if isinstance(value, list):
        return [lied(one, lie) for one in value]
    return lie if isinstance(value, str) else value


@pytest.mark.parametrize("lie", HOSTILE, ids=["img", "long", "rtl", "script", "escape"])
def test_whatever_a_name_is_the_page_stays_as_it_is(browser: Browser, full: Running, lie: str) -> None:
    Liar.picture = lied(full.get("/dashboard/state")[1], lie) | {"priorities": {lie: 1}}
    with ThreadingHTTPServer(("127.0.0.1", 0), Liar) as server:
        thread = threading.Thread(target=server.serve_forever, args=[0.05])
        thread.start()
        try:
            for width in (400, 1600):
                browser.look(width, "dark")
                browser.open(f"http://127.0.0.1:{server.server_port}/dashboard")
                browser.wait("return document.querySelectorAll('#latest tbody tr').length > 4")
                assert lie in browser.run("return document.querySelector('#backends').textContent")
                assert browser.run(FITS)
                assert browser.run("return document.querySelectorAll('img, main script').length") == 0
                assert browser.run("return document.title") == "Inference Gateway"
            browser.open("about:blank")
        finally:
            server.shutdown()
            thread.join()


def test_it_is_made_for_those_who_do_not_see_it(browser: Browser, full: Running) -> None:
    opened(browser, full)
    assert browser.run("return document.documentElement.lang") == "en"
    assert browser.run("return ['header', 'main', 'h1'].map(tag => document.querySelectorAll(tag).length)") == [1, 1, 1]
    for kind, scope in (("thead th", "col"), ("tbody th", "row")):
        assert browser.run(f"return [...new Set([...document.querySelectorAll('{kind}')].map(th => th.scope))]") == [scope]
    unnamed = """return [...document.querySelectorAll('table, section, svg, input, button')].filter(one =>
        !one.getAttribute('aria-label') && !one.getAttribute('aria-labelledby') && !one.innerText
        && !(one.labels && one.labels.length) && one.getAttribute('aria-hidden') !== 'true').map(one => one.outerHTML)"""
    assert browser.run(unnamed) == []
    roles = (
        "return [...new Set([...document.querySelectorAll('table, tr, td, tbody th')].map(one => one.getAttribute('role')))]"
    )
    assert sorted(browser.run(roles)) == ["cell", "row", "rowheader", "table"]


def test_the_keyboard_reaches_every_control(browser: Browser, full: Running) -> None:
    opened(browser, full)
    reached = []
    for _ in range(2):
        browser.press(TAB)
        reached.append(browser.focused())
        assert browser.run("return getComputedStyle(document.activeElement).outlineStyle") == "solid"
    assert reached == ["a", "pause"]
    browser.press(ENTER)
    browser.wait("return document.getElementById('link').textContent === 'paused'")
    assert browser.run("return document.getElementById('pause').getAttribute('aria-pressed')") == "true"
    before = browser.text("#about")
    time.sleep(1.2)
    assert browser.text("#about") == before
    browser.press(ENTER)
    browser.wait(LIVE)


def test_nothing_moves_from_second_to_second(browser: Browser, full: Running) -> None:
    opened(browser, full)
    browser.wait("return document.querySelectorAll('#latest tbody tr').length > 4")
    browser.run(
        """window.moved = 0;
           new PerformanceObserver((list) => { for (const one of list.getEntries()) window.moved += one.value; })
             .observe({type: 'layout-shift'});"""
    )
    time.sleep(3)
    assert browser.run("return window.moved") == 0


def test_a_lost_connection_is_said_and_made_again(tmp_path: Path, browser: Browser) -> None:
    with backend(answers) as one:
        with gateway_of(tmp_path, one) as gateway:
            opened(browser, gateway)
            port = gateway.port
        browser.wait("return document.getElementById('link').textContent === 'connection lost'")
        assert re.search(r"This is how things were \d+ s ago", browser.text("#lost"))
        with gateway_of(tmp_path, one, PORT=str(port)) as again:
            if again.port == port:
                browser.wait(LIVE)
                assert not browser.run("return document.getElementById('lost').offsetParent")
        browser.console()  # which tells of each attempt that failed


def test_when_too_many_watch_the_page_says_so(tmp_path: Path, browser: Browser) -> None:
    with Running(tmp_path) as gateway:
        viewers = [gateway.connect() for _ in range(VIEWERS)]
        for viewer in viewers:
            viewer.sendall(b"GET /dashboard/events HTTP/1.1\r\nHost: g\r\n\r\n")
            assert viewer.recv(12) == b"HTTP/1.1 200"
        browser.open(f"{gateway.url}/dashboard")
        browser.wait("return document.getElementById('about').textContent.includes('watch the dashboard already')")
        for viewer in viewers:
            viewer.close()
        browser.wait(LIVE)
        browser.console()  # which tells of each attempt that failed


def keys_of(directory: Path) -> tuple[str, str]:
    """A key with admin and one without."""

    def add(*options: str) -> str:
        command = [sys.executable, "-m", "gateway.cli", "keys", "add", "--keys", str(directory / "keys.toml"), *options]
        done = subprocess.run(command, env=clean_environment(), capture_output=True, text=True, timeout=PATIENCE, check=True)
        return done.stdout.strip()

    return add("--tenant", "ops", "--admin"), add("--tenant", "someone")


def test_it_asks_for_a_key_says_which_is_wrong_and_keeps_the_right_one_for_its_tab(tmp_path: Path, browser: Browser) -> None:
    boss, user = keys_of(tmp_path)
    with Running(tmp_path, GATEWAY_KEYS=str(tmp_path / "keys.toml")) as gateway:
        browser.open(f"{gateway.url}/dashboard")
        browser.wait("return document.activeElement.id === 'key'")
        assert browser.text("#ask-problem") == ""
        assert browser.run(FITS)
        for wrong, words in (("no-such-key", "not valid"), (user, "no admin rights"), ("\u00fc", "not valid")):
            browser.press(wrong + ENTER)
            browser.wait("return document.getElementById('ask-problem').textContent.includes(arguments[0])", words)
            browser.wait("return document.activeElement.id === 'key'")
        browser.press(boss + ENTER)
        browser.wait(LIVE)
        assert "requests are echoed" in browser.text("#backends-note")
        assert boss not in browser.run("return document.documentElement.outerHTML + location.href + document.cookie")
        assert ask(gateway, HELLO, authorization=f"Bearer {user}").status == 200
        browser.wait("return document.querySelector('#tenants').innerText.includes('someone')")
        browser.run("location.reload()")
        browser.wait(LIVE)
        browser.run("document.getElementById('forget').click()")
        browser.wait("return document.activeElement.id === 'key'")
        assert browser.run("return sessionStorage.length") == 0
        assert boss not in gateway.lines()


# --- without a browser


def test_a_viewer_does_not_hold_up_a_stop(tmp_path: Path) -> None:
    with Running(tmp_path, GATEWAY_GRACE="60s") as gateway:
        client = gateway.connect()
        client.sendall(b"GET /dashboard/events HTTP/1.1\r\nHost: g\r\n\r\n")
        received = client.recv(65536)
        assert received.startswith(b"HTTP/1.1 200")
        begun = time.monotonic()
        gateway.process.terminate()
        while data := client.recv(65536):
            received += data
        client.close()
        gateway.process.wait(PATIENCE)
    assert time.monotonic() - begun < 30
    assert b'"draining":true' in received
    assert received.endswith(b"0\r\n\r\n")


def test_a_viewer_that_does_not_read_costs_no_memory_and_no_time(tmp_path: Path) -> None:
    with Running(tmp_path) as gateway:
        stuck = gateway.connect(receive_buffer=4096)
        stuck.sendall(b"GET /dashboard/events HTTP/1.1\r\nHost: g\r\n\r\n")
        before = gateway.get("/dashboard/state")[1]["uptime"]
        wait_for(lambda: gateway.get("/dashboard/state")[1]["uptime"] > before + 3)
        stuck.close()
        wait_for(lambda: gateway.get("/dashboard/state")[1]["connections"] <= 1)


def test_top_shows_a_running_gateway(tmp_path: Path) -> None:
    boss, user = keys_of(tmp_path)
    with Running(tmp_path, GATEWAY_KEYS=str(tmp_path / "keys.toml")) as gateway:
        assert ask(gateway, HELLO, authorization=f"Bearer {user}").status == 200
        command = [sys.executable, "-m", "gateway.cli", "top", "--url", gateway.url]

        def run(key: str) -> subprocess.CompletedProcess[str]:
            environment = clean_environment(GATEWAY_ADMIN_KEY=key, COLUMNS="120")
            return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE, check=False)

        done = run(boss)
        assert done.returncode == 0, done.stderr
        assert "echo" in done.stdout
        assert "healthy" in done.stdout
        assert "200" in done.stdout
        refused = run(user)
        assert (refused.returncode, refused.stdout) == (1, "")
        assert "GATEWAY_ADMIN_KEY" in refused.stderr

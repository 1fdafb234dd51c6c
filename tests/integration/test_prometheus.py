"""What a real Prometheus makes of the metrics, the alert rules and the dashboard."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]
from prometheus_client.parser import text_string_to_metric_families

from ..conftest import cannot_run
from .asking import HELLO, STREAM, Request, ask, streams, table, until
from .backends import Connection, ScriptedBackend, backend, completion
from .collector import collector
from .name_server import name_server
from .processes import PATIENCE, Running, free_port, wait_for

DEPLOY = Path(__file__).parents[2] / "deploy"
ALERTS = DEPLOY / "prometheus" / "alerts.yml"
ADAPTER = DEPLOY / "kubernetes" / "monitoring" / "adapter-values.yaml"
DASHBOARD = DEPLOY / "grafana" / "inference-gateway.json"
OF_PROMETHEUS = {"instance", "job", "le", "__name__", "namespace", "pod"}


def program(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        cannot_run(f"no {name}", "apt-get install prometheus")
    return found


@contextmanager
def busy_gateway(directory: Path) -> Iterator[tuple[Running, ScriptedBackend]]:
    """A gateway that has answered, streamed, retried, refused, limited, traced and kept."""
    posts: list[Request] = []

    def script(connection: Connection, request: Request) -> None:
        posts.append(request)
        used = {"prompt_tokens": 7, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 3}}
        usage = b"data: %b\n\n" % json.dumps({"choices": [], "usage": used}).encode()
        if len(posts) == 1:
            connection.answer(b"{}", b"500 Oops")
        elif json.loads(request[2]).get("stream"):
            streams("one", "two", usage=usage)(connection, request)
        else:
            connection.answer(completion())

    with collector() as receiver, backend(script) as one, backend(script) as other, name_server() as names:
        tables = table("a", one.url, slots=4) + table("b", other.url, slots=4) + table("found", "dns+http://nobody.example")
        (directory / "gateway.toml").write_text(tables)
        parts = {"GATEWAY_LEDGER": "usage.sqlite", "GATEWAY_LIMIT_TOKENS": "100000", "GATEWAY_DNS_SERVER": names.address}
        parts |= receiver.environment()
        with Running(directory, "--config", "gateway.toml", **parts) as running:
            until(running, "healthy", "a", "b")
            for body in (HELLO, STREAM, {**HELLO, "model": 'evil"}\n'}, {"messages": 3}, {**HELLO, "max_tokens": 10**6}):
                ask(running, body)
            wait_for(lambda: receiver.spans)
            yield running, one


def page(running: Running, accept: str = "text/plain") -> str:
    request = urllib.request.Request(f"{running.url}/metrics", headers={"Accept": accept})
    with urllib.request.urlopen(request, timeout=PATIENCE) as response:
        text: str = response.read().decode()
    return text


def test_promtool_finds_nothing_to_say(tmp_path: Path) -> None:
    promtool = program("promtool")
    with busy_gateway(tmp_path) as (running, _):
        text = page(running)
    checked = subprocess.run([promtool, "check", "metrics"], input=text.encode(), capture_output=True, check=False)
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, b"", b"")
    subprocess.run([promtool, "check", "rules", str(ALERTS)], check=True, capture_output=True)


# --- what the rules and the dashboard name is there


def alerts() -> list[tuple[str, str]]:
    """(expression, everything that names labels of its result)."""
    groups = yaml.safe_load(ALERTS.read_text())["groups"]
    return [(rule["expr"], str(rule["annotations"])) for group in groups for rule in group["rules"]]


def panels() -> list[tuple[str, str]]:
    board = json.loads(DASHBOARD.read_text())
    return [(target["expr"], target["legendFormat"]) for panel in board["panels"] for target in panel.get("targets", [])]


def scaled_by() -> list[tuple[str, str]]:
    """What autoscalers in Kubernetes go by."""
    rules = yaml.safe_load(ADAPTER.read_text())["rules"]
    return [(rule["seriesQuery"], "") for rule in [*rules["custom"], *rules["external"]]]


def labels_of(text: str) -> dict[str, set[str]]:
    """Each sample's name with the labels that it is told apart by."""
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


def named(expression: str, told: str) -> tuple[dict[str, set[str]], set[str]]:
    """The metrics of an expression with the labels they are chosen by, and the labels that it keeps or tells."""
    metrics: dict[str, set[str]] = {}
    for name, chosen in re.findall(r"\b((?:gateway|process)_[a-z_]+)(?:\{([^}]*)\})?", expression):
        metrics.setdefault(name, set()).update(re.findall(r"([a-z_]+)\s*(?:=~|!~|!=|=)", chosen))
    kept = {label.strip() for group in re.findall(r"\bby \(([^)]*)\)", expression) for label in group.split(",")}
    return metrics, kept | set(re.findall(r"\{\{\s*(?:\$labels\.)?([a-z_]+)\s*\}\}", told))


def test_every_metric_and_label_that_rules_dashboard_and_autoscalers_name_is_there(tmp_path: Path) -> None:
    with busy_gateway(tmp_path) as (running, _):
        there = labels_of(page(running))
    for expression, told in [*alerts(), *panels(), *scaled_by()]:
        metrics, kept = named(expression, told)
        assert metrics or "up{" in expression, expression
        for name, chosen in metrics.items():
            assert name in there, f"no {name}, which {expression} names"
            assert chosen - OF_PROMETHEUS <= there[name], f"{name} has no {chosen - OF_PROMETHEUS - there[name]}"
        missing = kept - OF_PROMETHEUS - set().union(*[there[name] for name in metrics])
        assert not missing, f"{expression}: nothing has {missing}"


def test_the_dashboard_shows_what_there_is(tmp_path: Path) -> None:
    """The other way round: each of the gateway's own metrics has its panel."""
    with busy_gateway(tmp_path) as (running, _):
        families = {
            family.name for family in text_string_to_metric_families(page(running)) if family.name.startswith("gateway_")
        }
    shown = {name for expression, _ in panels() for name in named(expression, "")[0]}
    shown |= {re.sub(r"_(total|bucket)$", "", name) for name in shown}
    assert {name for name in families - shown if name.startswith("gateway_")} == {"gateway_draining"}


# --- a real one


class Prometheus:
    """Asks the gateway each second."""

    def __init__(self, port: int) -> None:
        self._url = f"http://127.0.0.1:{port}/api/v1/"

    def ask(self, path: str, **query: str) -> Any:
        """The data of an answer; None while it does not answer. What it says of a bad query fails the test."""
        try:
            with urllib.request.urlopen(f"{self._url}{path}?{urllib.parse.urlencode(query)}", timeout=PATIENCE) as response:
                return json.load(response)["data"]
        except urllib.error.HTTPError as error:
            with error:
                if error.code == 503:  # it has yet to read its disk
                    return None
                pytest.fail(f"{query}: {error.read().decode()}")
        except OSError:
            return None

    def value(self, query: str) -> float:
        """The sum of what a query finds."""
        found = self.ask("query", query=query)
        return sum(float(one["value"][1]) for one in found["result"]) if found else 0.0


@contextmanager
def prometheus(directory: Path, target: str) -> Iterator[Prometheus]:
    port, command = free_port(), program("prometheus")
    config = {
        "global": {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(ALERTS)],
        "scrape_configs": [{"job_name": "inference-gateway", "static_configs": [{"targets": [target]}]}],
    }
    (directory / "prometheus.yml").write_text(yaml.safe_dump(config))
    options = [f"--config.file={directory / 'prometheus.yml'}", f"--storage.tsdb.path={directory / 'tsdb'}"]
    with (directory / "prometheus.log").open("wb") as log:
        process = subprocess.Popen([command, *options, f"--web.listen-address=127.0.0.1:{port}"], stdout=log, stderr=log)
    try:
        yield Prometheus(port)
    finally:
        process.terminate()
        process.wait(PATIENCE)


def test_a_real_prometheus_scrapes_it_and_understands_every_query(tmp_path: Path) -> None:
    program("prometheus")
    with busy_gateway(tmp_path) as (running, _), prometheus(tmp_path, f"127.0.0.1:{running.port}") as server:
        wait_for(lambda: server.value('up{job="inference-gateway"}') == 1)
        assert server.value('gateway_requests_total{route="/v1/chat/completions"}') == 5
        assert server.value("gateway_retries_total") == 1
        assert server.value('gateway_tokens_total{type="cached"}') == 3
        assert server.value('gateway_backend_state{state="healthy"}') == 2
        wait_for(lambda: server.value("gateway_event_loop_delay_seconds_count") > 0)
        for expression, _ in panels():
            query = expression.replace("$__rate_interval", "1m").replace("$instance", ".*")
            assert server.ask("query", query=query)["resultType"] == "vector", expression
        wait_for(lambda: {rule["health"] for rule in rules(server)} == {"ok"})
        assert len(rules(server)) == len(alerts())


def rules(server: Prometheus) -> list[Any]:
    return [rule for group in server.ask("rules")["groups"] for rule in group["rules"]]

"""The compose file is one, by the specification's own schema, and its parts fit each other and the gateway."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

from ..conftest import cannot_run
from .variables import AFTER_GRACE, DEPLOY, settings, unknown

HERE = DEPLOY / "compose"
FILE = HERE / "compose.yaml"
WHOLE: dict[str, Any] = yaml.safe_load(FILE.read_text())
SERVICES: dict[str, dict[str, Any]] = WHOLE["services"]
PROMETHEUS: dict[str, Any] = yaml.safe_load((HERE / "prometheus.yml").read_text())
OURS = [name for name, service in SERVICES.items() if service["image"] == "inference-gateway:local"]


def test_it_is_a_compose_file() -> None:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(FILE)]
    said = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert said.returncode == 0, said.stdout + said.stderr


def environment(service: str) -> dict[str, str]:
    """With something in the place of each variable."""
    given = SERVICES[service]["environment"]
    return {name: re.sub(r"\$\{(\w+)[^}]*\}", r"\1", str(value)) for name, value in given.items()}


@pytest.mark.parametrize("service", OURS)
def test_a_gateway_is_told_what_it_knows(service: str) -> None:
    assert not unknown(environment(service))
    assert settings(environment(service)).keys == "/etc/inference-gateway/keys.toml"


def test_the_gateway_asks_each_model_server_by_its_name() -> None:
    (port,) = {service["healthcheck"]["test"][-1].split(":")[2].split("/")[0] for service in models().values()}
    assert {own.url for own in settings(environment("gateway")).backends} == {f"http://{name}:{port}" for name in models()}


def models() -> dict[str, dict[str, Any]]:
    return {name: service for name, service in SERVICES.items() if "llama.cpp" in service["image"]}


def test_only_this_machine_reaches_a_port() -> None:
    published = [port for service in SERVICES.values() for port in service.get("ports", [])]
    assert published
    assert all(port.startswith("127.0.0.1:") for port in published)


def test_nothing_starts_without_passwords_of_ones_own() -> None:
    asked = set(re.findall(r"\$\{(\w*PASSWORD)\b(:\?)?", FILE.read_text()))
    assert {required for _, required in asked} == {":?"}
    offered = [line for line in (HERE / "env.example").read_text().splitlines() if not line.startswith("#")]
    assert dict(line.split("=") for line in offered) == dict.fromkeys((name for name, _ in asked), "")


def test_what_is_mounted_is_there() -> None:
    for name, service in SERVICES.items():
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            if source.startswith("."):
                assert (HERE / source).is_file(), f"{name} mounts {source}"
            else:
                assert source.startswith("/") or source in WHOLE["volumes"], f"{name} mounts {source}"


def test_secrets_are_not_for_the_repository() -> None:
    ignored = (HERE / ".gitignore").read_text().split()
    assert [secret["file"] for secret in WHOLE["secrets"].values()] == [f"./{name}" for name in ignored if name != ".env"]
    assert ".env" in ignored


def test_who_is_waited_for_can_say_that_it_is_well() -> None:
    waits = [(one, how) for service in SERVICES.values() for one, how in service.get("depends_on", {}).items()]
    for one, how in waits:
        assert how["condition"] != "service_healthy" or "test" in SERVICES[one]["healthcheck"], one


def test_only_the_gateways_reach_what_asks_nobody_for_a_key() -> None:
    for name in models():
        (network,) = SERVICES[name]["networks"]
        assert [one for one, service in SERVICES.items() if network in service.get("networks", [])] == ["gateway", *models()]


def test_the_end_is_waited_for() -> None:
    patience = float(SERVICES["gateway"]["stop_grace_period"].removesuffix("s"))
    assert patience > settings(environment("gateway")).grace + AFTER_GRACE


def test_prometheus_looks_at_each_gateway_with_the_key_it_is_given() -> None:
    (job,) = PROMETHEUS["scrape_configs"]
    (discovered,) = job["dns_sd_configs"]
    (secret,) = SERVICES["prometheus"]["secrets"]
    assert discovered["names"] == ["gateway"]
    assert discovered["port"] == settings(environment("gateway")).port
    assert job["authorization"]["credentials_file"] == f"/run/secrets/{secret}"
    mounted = {volume.split(":")[1] for volume in SERVICES["prometheus"]["volumes"]}
    assert set(PROMETHEUS["rule_files"]) <= mounted
    assert f'job="{job["job_name"]}"' in (DEPLOY / "prometheus" / "alerts.yml").read_text()


def test_promtool_understands_the_configuration() -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        cannot_run("no promtool", "apt-get install prometheus")
    command = [promtool, "check", "config", "--syntax-only", str(HERE / "prometheus.yml")]
    said = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert said.returncode == 0, said.stderr


def test_the_collector_has_what_its_pipelines_name() -> None:
    config = yaml.safe_load((HERE / "collector.yaml").read_text())
    endpoint = config["receivers"]["otlp"]["protocols"]["http"]["endpoint"]
    assert environment("gateway")["OTEL_EXPORTER_OTLP_ENDPOINT"] == f"http://collector:{endpoint.rpartition(':')[2]}"
    for pipeline in config["service"]["pipelines"].values():
        for part, names in pipeline.items():
            assert set(names) <= set(config[part])

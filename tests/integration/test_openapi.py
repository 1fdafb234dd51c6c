"""The OpenAPI document, and schemathesis, which asks a running gateway whatever the document allows, and more."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gateway.app import App
from gateway.core import openapi
from gateway.core.endpoints import ENDPOINTS

from ..conftest import cannot_run
from .processes import Running, clean_environment, wait_for

CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with Running(tmp_path_factory.mktemp("gateway")) as running:
        wait_for(lambda: running.get("/readyz")[0] == 200)
        yield running


def test_every_route_is_in_the_document_and_nothing_else() -> None:
    routes = {
        (method.lower(), re.sub(r"<(?:\w+:)?(\w+)>", r"{\1}", rule.rule))
        for rule in App.router.url_map.iter_rules()
        for method in (rule.methods or set()) - {"HEAD", "OPTIONS"}
    }
    assert routes == {(row.method, row.path) for row in openapi.OPERATIONS}
    assert {path for _, path in routes} >= set(ENDPOINTS)


def test_the_document_is_that_of_the_types(gateway: Running) -> None:
    status, document = gateway.get("/openapi.json")
    assert status == 200
    assert document["openapi"] == "3.1.0"
    schemas = document["components"]["schemas"]
    temperature = schemas["ChatRequest"]["properties"]["temperature"]
    assert {"type": "number", "minimum": 0, "maximum": 2} in temperature["anyOf"]
    assert schemas["ChatRequest"]["required"] == ["messages"]
    assert "additionalProperties" not in schemas["ChatRequest"]
    strict = json.loads(openapi.document("1", strict=True))["components"]["schemas"]
    assert strict["ChatRequest"]["additionalProperties"] is False
    assert strict["Image"]["additionalProperties"] is False
    for path, operations in document["paths"].items():
        for operation in operations.values():
            assert {"200", "400", "404", "429", "500", "503"} <= set(operation["responses"]), path


def test_every_field_of_every_endpoint_is_in_the_document_for_people() -> None:
    text = (Path(__file__).parents[2] / "docs/api.md").read_text()
    rows = {
        path: row for row in text.splitlines() if row.startswith("| POST") for path in re.findall(r"/[\w/]+", row.split("|")[1])
    }
    assert set(rows) == set(ENDPOINTS)
    shared = "".join(re.findall(r"- \*\*Of .*?(?=\n- |\n\n)", text, re.S))
    for path, endpoint in ENDPOINTS.items():
        for field in endpoint.schema.type.__struct_fields__:
            assert f"`{field}`" in rows[path] + shared, (path, field)


def test_every_reference_leads_somewhere() -> None:
    document = json.loads(openapi.document("1", strict=False))

    def references(value: Any) -> Iterator[str]:
        if isinstance(value, dict):
            yield from (one for name, one in value.items() if name == "$ref" and isinstance(one, str))
            for inner in value.values():
                yield from references(inner)
        elif isinstance(value, list):
            for inner in value:
                yield from references(inner)

    found = set(references(document))
    assert len(found) > 30
    for reference in found:
        place: Any = document
        for step in reference.removeprefix("#/").split("/"):
            place = place[step]


def test_nothing_that_schemathesis_asks_is_answered_otherwise_than_documented(gateway: Running, tmp_path: Path) -> None:
    command = Path(sys.executable).with_name("st")
    if not command.exists():
        cannot_run("no schemathesis", "pip install schemathesis")
    options = ["--checks", CHECKS, "--max-examples", "25", "--seed", "1", "--generation-deterministic", "--no-color"]
    options += ["--exclude-path", "/admin/backends/{name}"]  # it might take the only backend out of service
    options += ["--exclude-path", "/admin/explain", "--exclude-path", "/rerank"]  # they ask what others ask
    options += ["--exclude-path", "/dashboard/events"]  # it has no end
    options += ["--phases", "examples,fuzzing", "--request-timeout", "20"]
    done = subprocess.run(
        [command, "run", f"{gateway.url}/openapi.json", *options],
        cwd=tmp_path,
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    generated = re.search(r"(\d+) generated", done.stdout)
    assert generated is not None, done.stdout
    assert int(generated[1]) > 100

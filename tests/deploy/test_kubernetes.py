"""The manifests are what Kubernetes takes, and name each other, the gateway's settings and its metrics as they are."""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml  # type: ignore[import-untyped]
from jsonschema import Draft202012Validator

from .variables import AFTER_GRACE, DEPLOY, settings, unknown

HERE = DEPLOY / "kubernetes"
EXAMPLE = HERE / "overlays" / "example"
NOT_APPLIED = {"secret.example.yaml", "adapter-values.yaml"}
OLDEST = "1.30"
"""The first whose kubelet sleeps by itself before a container ends."""

Document = dict[str, Any]


def read(path: Path) -> list[Document]:
    return list(yaml.safe_load_all(path.read_text()))


def built(directory: Path) -> list[Document]:
    """The documents of a kustomization and of those it names, as they stand in the files."""
    (kustomization,) = read(directory / "kustomization.yaml")
    found = []
    for name in [*kustomization["resources"], *kustomization.get("components", [])]:
        path = directory / name
        found += built(path) if path.is_dir() else read(path)
    return found


@cache
def rendered() -> list[Document]:
    """What kubectl makes of the example; without kubectl, the documents that it would make it of."""
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        return built(EXAMPLE)
    said = subprocess.run([kubectl, "kustomize", EXAMPLE], capture_output=True, text=True, timeout=60, check=False)
    assert said.returncode == 0, said.stderr
    return list(yaml.safe_load_all(said.stdout))


def name(document: Document) -> tuple[str, str]:
    return document["kind"], document["metadata"]["name"]


BUILT = {name(document): document for document in built(EXAMPLE)}
CRDS = {"ServiceMonitor", "PrometheusRule"}
GATEWAY = BUILT["Deployment", "inference-gateway"]
POD = GATEWAY["spec"]["template"]["spec"]
(CONTAINER,) = POD["containers"]


# --- what Kubernetes takes


@pytest.mark.parametrize("version", [OLDEST, kubernetes_validate.latest_version()])
def test_every_document_is_of_its_kind(version: str) -> None:
    for document in [*rendered(), *read(HERE / "base" / "secret.example.yaml")]:
        if document["kind"] not in CRDS:
            kubernetes_validate.validate(document, version, strict=True)


def test_the_check_finds_a_mistake() -> None:
    (service,) = read(HERE / "base" / "service.yaml")
    wrong = {**service, "spec": {**service["spec"], "port": 80}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, OLDEST, strict=True)


def of(**properties: Any) -> Document:
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


TEXT = {"type": "string", "minLength": 1}
LABELS = {"type": "object", "additionalProperties": TEXT}
ENDPOINT = of(
    port=TEXT,
    path=TEXT,
    interval={"type": "string", "pattern": r"^(0|(([0-9]+)h)?(([0-9]+)m)?(([0-9]+)s)?)$"},
    authorization=of(type={"const": "Bearer"}, credentials=of(name=TEXT, key=TEXT)),
)
RULE = {**of(alert=TEXT, expr=TEXT, labels=LABELS, annotations=LABELS), "required": ["alert", "expr"]}
RULE["properties"]["for"] = TEXT
SPECS = {
    "ServiceMonitor": of(jobLabel=TEXT, selector=of(matchLabels=LABELS), endpoints={"type": "array", "items": ENDPOINT}),
    "PrometheusRule": of(groups={"type": "array", "items": of(name=TEXT, rules={"type": "array", "items": RULE})}),
}
"""Of monitoring.coreos.com/v1 (prometheus-operator's CRDs) the fields that are used here."""


@pytest.mark.parametrize("kind", sorted(CRDS))
def test_what_the_prometheus_operator_reads_is_of_its_kind(kind: str) -> None:
    document = BUILT[kind, "inference-gateway"]
    assert document["apiVersion"] == "monitoring.coreos.com/v1"
    Draft202012Validator(SPECS[kind]).validate(document["spec"])


def test_kubectl_makes_the_same_documents_of_it() -> None:
    made = {(kind, "inference-gateway" if kind == "ConfigMap" else called) for kind, called in map(name, rendered())}
    assert made - {("ConfigMap", "inference-gateway")} == set(BUILT)
    assert all(document["metadata"].get("namespace", "inference") == "inference" for document in rendered())


def test_every_file_is_in_a_kustomization() -> None:
    for path in HERE.rglob("*.yaml"):
        if path.name not in NOT_APPLIED | {"kustomization.yaml"}:
            (kustomization,) = read(path.parent / "kustomization.yaml")
            assert path.name in kustomization["resources"], path


# --- names fit


def labels(kind: str, called: str) -> dict[str, str]:
    """Those of its pods, or its own."""
    document = BUILT[kind, called]
    found: dict[str, str] = document["spec"]["template"]["metadata"]["labels"] if kind == "Deployment" else {}
    return found or document["metadata"]["labels"]


def ports(deployment: str) -> dict[str, int]:
    (container,) = BUILT["Deployment", deployment]["spec"]["template"]["spec"]["containers"]
    return {port["name"]: port["containerPort"] for port in container["ports"]}


@pytest.mark.parametrize("deployment", ["inference-gateway", "model-server"])
def test_selectors_match_the_pods_they_mean(deployment: str) -> None:
    pod = labels("Deployment", deployment).items()
    specs = [BUILT[kind, deployment]["spec"] for kind in ("Deployment", "Service", "NetworkPolicy")]
    chosen = [specs[0]["selector"]["matchLabels"], specs[1]["selector"], specs[2]["podSelector"]["matchLabels"]]
    spread = BUILT["Deployment", deployment]["spec"]["template"]["spec"].get("topologySpreadConstraints", [])
    chosen += [one["labelSelector"]["matchLabels"] for one in spread]
    assert all(selector.items() <= pod for selector in chosen)
    (port,) = specs[1]["ports"]
    assert port["targetPort"] in ports(deployment)
    assert {one["port"] for rule in specs[2]["ingress"] for one in rule["ports"]} == set(ports(deployment))


def test_the_budget_and_the_monitor_mean_the_gateway() -> None:
    budget = BUILT["PodDisruptionBudget", "inference-gateway"]["spec"]["selector"]["matchLabels"]
    assert budget.items() <= labels("Deployment", "inference-gateway").items()
    monitor = BUILT["ServiceMonitor", "inference-gateway"]["spec"]
    assert monitor["selector"]["matchLabels"].items() <= labels("Service", "inference-gateway").items()
    assert not monitor["selector"]["matchLabels"].items() <= labels("Service", "model-server").items()
    (port,) = BUILT["Service", "inference-gateway"]["spec"]["ports"]
    assert [endpoint["port"] for endpoint in monitor["endpoints"]] == [port["name"]]
    job = labels("Service", "inference-gateway")[monitor["jobLabel"]]
    assert f'job="{job}"' in (DEPLOY / "prometheus" / "alerts.yml").read_text()


def probes(container: Document) -> Iterator[Document]:
    yield from (container[one]["httpGet"] for one in ("startupProbe", "livenessProbe", "readinessProbe") if one in container)


def test_probes_ask_pages_that_need_no_key_on_ports_that_there_are() -> None:
    for deployment, pages in (("inference-gateway", {"/healthz", "/readyz"}), ("model-server", {"/health"})):
        (container,) = BUILT["Deployment", deployment]["spec"]["template"]["spec"]["containers"]
        assert {probe["path"] for probe in probes(container)} == pages
        assert {probe["port"] for probe in probes(container)} <= set(ports(deployment))


def test_the_gateway_and_the_model_servers_reach_each_other_and_nobody_else_reaches_those() -> None:
    policy = BUILT["NetworkPolicy", "model-server"]["spec"]
    (rule,) = policy["ingress"]
    (who,) = rule["from"]
    assert who["podSelector"]["matchLabels"].items() <= labels("Deployment", "inference-gateway").items()
    reached = BUILT["NetworkPolicy", "inference-gateway"]["spec"]["egress"]
    selectors = [to["podSelector"]["matchLabels"] for rule in reached for to in rule.get("to", []) if "podSelector" in to]
    assert [selector.items() <= labels("Deployment", "model-server").items() for selector in selectors] == [True]


def test_the_account_may_see_what_discovery_watches_and_no_more() -> None:
    (rule,) = BUILT["Role", "inference-gateway"]["rules"]
    assert rule == {"apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "verbs": ["list", "watch"]}
    binding = BUILT["RoleBinding", "inference-gateway"]
    assert (binding["roleRef"]["kind"], binding["roleRef"]["name"]) in BUILT
    assert [(one["kind"], one["name"]) for one in binding["subjects"]] == [("ServiceAccount", POD["serviceAccountName"])]


def test_volumes_and_their_mounts_fit() -> None:
    mounted = {mount["name"]: mount["mountPath"] for mount in CONTAINER["volumeMounts"]}
    assert set(mounted) == {volume["name"] for volume in POD["volumes"]}
    given = environment()
    assert given["GATEWAY_CONFIG"] == f"{mounted['config']}/gateway.toml"
    assert given["GATEWAY_KEYS"] == f"{mounted['keys']}/keys.toml"
    (kustomization,) = read(HERE / "base" / "kustomization.yaml")
    (generated,) = kustomization["configMapGenerator"]
    assert {"name": generated["name"]} in [volume.get("configMap") for volume in POD["volumes"]]


# --- the gateway understands it


def environment() -> dict[str, str]:
    return {one["name"]: one["value"] for one in CONTAINER["env"]}


def test_it_sets_what_there_is() -> None:
    (example,) = read(HERE / "base" / "secret.example.yaml")
    assert {"secretRef": {"name": example["metadata"]["name"], "optional": True}} in CONTAINER["envFrom"]
    assert not unknown([*environment(), *example["stringData"]])
    settings(environment() | example["stringData"])


DISCOVERED = "k8s+http://model-server.inference:http"


def file_of(directory: Path) -> dict[str, Any]:
    return tomllib.loads((directory / "gateway.toml").read_text())


@pytest.mark.parametrize("directory", [HERE / "base", EXAMPLE])
def test_its_file_is_one_and_means_the_model_servers_there_are(directory: Path) -> None:
    given = file_of(directory)
    (backend,) = given["backends"]
    assert backend["url"] == DISCOVERED
    # What is found there is a backend like any other, with the rest of the table.
    settings(environment(), {**given, "backends": [{**backend, "url": "http://10.0.0.1:8080"}]})


def test_what_is_discovered_is_a_service_of_the_namespace_and_a_port_that_has_the_name() -> None:
    service, namespace, port = re.fullmatch(r"k8s\+http://(.+)\.(.+):(.+)", DISCOVERED).groups()  # type: ignore[union-attr]
    assert [one["name"] for one in BUILT["Service", service]["spec"]["ports"]] == [port]
    (base,), (example,) = (read(directory / "kustomization.yaml") for directory in (HERE / "base", EXAMPLE))
    assert base["namespace"] == example["namespace"] == namespace
    assert ("Namespace", namespace) in BUILT


@pytest.mark.parametrize("directory", [HERE / "base", EXAMPLE])
def test_the_end_is_waited_for(directory: Path) -> None:
    grace = settings({}, {**file_of(directory), "backends": []}).grace
    still_answers = CONTAINER["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert POD["terminationGracePeriodSeconds"] > still_answers + grace + AFTER_GRACE


def test_every_container_is_locked_in() -> None:
    for (kind, called), document in BUILT.items():
        if kind == "Deployment":
            pod = document["spec"]["template"]["spec"]
            assert pod["securityContext"]["runAsNonRoot"], called
            assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
            for container in pod["containers"]:
                context = container["securityContext"]
                assert context["readOnlyRootFilesystem"] and not context["allowPrivilegeEscalation"], called
                assert context["capabilities"] == {"drop": ["ALL"]}
                assert {"cpu", "memory"} <= set(container["resources"]["requests"])


# --- numbers that things are scaled by


def test_autoscalers_scale_what_there_is_by_numbers_that_the_adapter_has() -> None:
    (values,) = read(HERE / "monitoring" / "adapter-values.yaml")
    offered = {kind: {rule["name"]["as"] for rule in values["rules"][kind]} for kind in ("custom", "external")}
    wanted: dict[str, set[str]] = {"custom": set(), "external": set()}
    for (kind, _), document in BUILT.items():
        if kind == "HorizontalPodAutoscaler":
            target = document["spec"]["scaleTargetRef"]
            assert (target["kind"], target["name"]) in BUILT
            assert "replicas" not in BUILT[target["kind"], target["name"]]["spec"], "the autoscaler says how many"
            for metric in document["spec"]["metrics"]:
                wanted["custom"] |= {metric["pods"]["metric"]["name"]} if "pods" in metric else set()
                wanted["external"] |= {metric["external"]["metric"]["name"]} if "external" in metric else set()
    assert wanted == offered


def test_the_rules_are_those_of_prometheus() -> None:
    rules = yaml.safe_load((DEPLOY / "prometheus" / "alerts.yml").read_text())
    assert BUILT["PrometheusRule", "inference-gateway"]["spec"] == rules, "write them anew: make docs"

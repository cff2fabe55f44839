"""The chart rendered by Helm's own engine, the documents in it, and what they are checked against."""

import copy
import json
import os
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from helm_python.chart import Chart

ROOT = Path(__file__).parents[1]
CHART = ROOT / "helm/orchestrator"
RELEASE, NAMESPACE = "manta", "ml"

Values = dict[str, Any]
Document = dict[str, Any]

RUN = (ROOT / "jobs/runs/quickstart.yaml").read_text()
SEARCH = (ROOT / "jobs/runs/search.yaml").read_text()
GPU = {
    "name": "gpu",
    "replicas": 1,
    "maxReplicas": 2,
    "resources": {"limits": {"cpu": "4", "memory": "32Gi", "nvidia.com/gpu": 1}},
    "shm": "4Gi",
    "labels": {"kind": "spot"},
    "annotations": {"note": "worker"},
    "priorityClassName": "batch",
    "idleTimeoutSeconds": 30,
    "rayStartParams": {"resources": "'{\"spot\": 1}'"},
}

EVERYTHING: Values = {
    "commonLabels": {"example.com/env": "test"},
    "commonAnnotations": {"example.com/contact": "team@example.com"},
    "attribution": {"owner": "ada", "team": "nlp", "costCenter": "cc-1"},
    "kueue": {"queue": "gpus", "managedBy": "kueue.x-k8s.io/multikueue"},
    "image": {"repository": "registry.example.com/manta", "pullSecrets": ["pull"], "cpu": {"tag": "1.0-cpu"}},
    "pods": {
        "labels": {"pod-label": "x"},
        "annotations": {"pod-note": "x"},
        "nodeSelector": {"pool": "ray"},
        "tolerations": [{"key": "ray", "operator": "Exists"}],
        "env": [{"name": "NCCL_DEBUG", "value": "WARN"}],
        "secrets": ["cloud"],
        "readinessProbe": {"exec": {"command": ["true"]}, "periodSeconds": 5},
        "livenessProbe": {"exec": {"command": ["true"]}, "periodSeconds": 5},
    },
    "serviceAccount": {"annotations": {"example.com/role": "manta"}},
    "cluster": {"upgrade": {"type": "Recreate"}, "workerGroups": [GPU], "head": {"nodeSelector": {"pool": "heads"}}},
    "endpoint": {
        "workerGroups": [GPU],
        "serving": {"deltas": ["support", "sql@candidate"], "length": 131072, "gpus": 1},
        "replicas": {"min": 1, "max": 3},
        "service": {"annotations": {"service-note": "x"}},
    },
    "ingress": {"enabled": True, "host": "manta.example.com", "tlsSecret": "certificate", "annotations": {"a": "b"}},
    "mlflow": {
        "backend": {"existingSecret": "postgres"},
        "artifacts": {"destination": "s3://b/a", "existingSecret": "s3"},
    },
    "storage": {"accessModes": ["ReadWriteMany"], "storageClass": "nfs"},
    "modelCache": {"enabled": True, "readOnly": True},
    "huggingFace": {"existingSecret": "hub", "endpoint": "https://hub.example.com", "offline": True},
    "auth": {"existingSecret": "ray-token"},
    "tls": {"enabled": True},
    "gcs": {"backend": "redis", "redis": {"address": "redis:6379", "existingSecret": "redis"}},
    "networkPolicy": {
        "jobClients": [{"namespaceSelector": {"matchLabels": {"team": "nlp"}}}],
        "monitoring": [{"namespaceSelector": {}}],
        "mlflowClients": [{"ipBlock": {"cidr": "10.0.0.0/8"}}],
        "egress": [{"ports": [{"port": 443, "protocol": "TCP"}]}],
    },
    "podDisruptionBudget": {"enabled": True},
    "monitoring": {"enabled": True, "labels": {"release": "prometheus"}, "dashboard": {"enabled": True}},
    "gc": {"timeZone": "Europe/Berlin", "dryRun": False},
    "train": {"enabled": True, "run": RUN, "overrides": ["method.rank=32"], "deadlineSeconds": 60},
    "search": {"enabled": True, "run": SEARCH, "timeZone": "Europe/Berlin"},
}

CASES: dict[str, tuple[tuple[str, ...], Values]] = {
    "defaults": ((), {}),
    "small": (("values-small.yaml",), {}),
    "gpu": (("values-gpu.yaml",), {}),
    "production": (("values-gpu.yaml", "values-production.yaml"), {}),
    "everything": ((), EVERYTHING),
    "everything, external": (
        (),
        {
            **EVERYTHING,
            "mlflow": {"enabled": False},
            "tracking": {"url": "https://mlflow.example.com", "existingSecret": "mlflow-login"},
            "gcs": {"backend": "rocksdb", "storage": {"storageClass": "ssd"}},
            "auth": {"mode": "disabled"},
            "autoscaler": {"enabled": False},
            "serviceAccount": {"create": False, "name": "ours"},
            "storage": {"existingClaim": "shared"},
            "modelCache": {"enabled": True, "existingClaim": "bases"},
        },
    ),
    "jobs alone": (
        (),
        {
            "cluster": {"enabled": False},
            "endpoint": {"enabled": False},
            "train": {"enabled": True, "run": RUN},
            "gc": {"enabled": False},
            "networkPolicy": {"enabled": False},
            "preflight": {"enabled": False},
            "gcs": {"backend": "rocksdb"},
        },
    ),
    "nothing": (
        (),
        {
            "cluster": {"enabled": False},
            "endpoint": {"enabled": False},
            "mlflow": {"enabled": False},
            "tracking": {"url": "http://mlflow"},
        },
    ),
}
"""Values files of the chart, and values on top."""


def merged(under: Mapping[str, Any], over: Mapping[str, Any]) -> Values:
    """As Helm merges values: mappings key by key, all else replaced."""
    out = copy.deepcopy(dict(under))
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(out.get(key), Mapping)
        out[key] = merged(out[key], value) if both else copy.deepcopy(value)
    return out


def values_of(case: str) -> Values:
    files, values = CASES[case]
    out: Values = {}
    for name in files:
        out = merged(out, yaml.safe_load((CHART / name).read_text()))
    return merged(out, values)


@cache
def _chart() -> Chart:
    return Chart.load(CHART)


def texts(values: Values) -> dict[str, str]:
    """Rendered text by template."""
    return _chart().render(values, name=RELEASE, namespace=NAMESPACE)


def render(values: Values) -> list[Document]:
    """The documents, as ``helm template`` gives them."""
    return [
        document
        for name, text in texts(values).items()
        if name.endswith(".yaml")
        for document in yaml.safe_load_all(text)
        if document
    ]


@cache
def _rendered(case: str) -> str:
    return json.dumps(render(values_of(case)))


def documents(case: str) -> list[Document]:
    found: list[Document] = json.loads(_rendered(case))
    return found


def name_of(document: Document) -> str:
    return f"{document['kind']}/{document['metadata']['name']}"


def ray_specs(document: Document) -> Iterator[Document]:
    """The Ray clusters in a document."""
    spec = document.get("spec", {})
    match document["kind"]:
        case "RayCluster":
            yield spec
        case "RayService":
            yield spec["rayClusterConfig"]
        case "RayJob":
            yield spec["rayClusterSpec"]
        case "RayCronJob":
            yield spec["jobTemplate"]["rayClusterSpec"]


def pods(document: Document) -> Iterator[tuple[str, Document]]:
    """Every pod that a document leads to, as ``(what it is, metadata and spec)``."""
    spec = document.get("spec", {})
    kind = document["kind"]
    if kind == "Pod":
        yield "pod", document
    elif kind == "Deployment":
        yield "pod", spec["template"]
    elif kind == "CronJob":
        yield "pod", spec["jobTemplate"]["spec"]["template"]
    for job in [spec] if kind == "RayJob" else [spec["jobTemplate"]] if kind == "RayCronJob" else []:
        yield "submitter", job["submitterPodTemplate"]
    for cluster in ray_specs(document):
        yield "head", cluster["headGroupSpec"]["template"]
        for group in cluster.get("workerGroupSpecs", []):
            yield f"worker {group['groupName']}", group["template"]


def containers(pod: Document) -> list[Document]:
    found: list[Document] = [*pod["spec"].get("initContainers", []), *pod["spec"]["containers"]]
    return found


# ---- schemas of what is not Kubernetes' own


def crd_folder() -> Path:
    """Where the schemas of KubeRay's and the monitors' resources are; skips where that is not said."""
    folder = os.environ.get("MANTA_CRD_SCHEMAS")
    if not folder:
        pytest.skip("MANTA_CRD_SCHEMAS is not set: KubeRay's and the monitors' documents are not checked by schema")
    return Path(folder)


def crd_schema(folder: Path, document: Document) -> Document:
    group, version = document["apiVersion"].split("/")
    found: Document = json.loads((folder / f"{group}_{version}_{document['kind']}.json").read_text())
    schema: Document = found["openAPIV3Schema"]
    return schema


def strict(schema: Any) -> Any:
    """Turn a resource's schema into one that refuses unknown keys; a key with a default need not be given."""
    if isinstance(schema, list):
        return [strict(s) for s in schema]
    if not isinstance(schema, dict):
        return schema
    out = {
        key: {name: strict(s) for name, s in value.items()} if key == "properties" else strict(value)
        for key, value in schema.items()
        if key not in ("default", "required")
    }
    properties = schema.get("properties", {})
    if properties:
        if "additionalProperties" not in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
            out["additionalProperties"] = False
        out["required"] = [k for k in schema.get("required", []) if "default" not in properties.get(k, {})]
    elif "required" in schema:
        out["required"] = schema["required"]
    return out


def without_nulls(value: Any) -> Any:
    """As the API server takes it: a null is no value."""
    if isinstance(value, dict):
        return {k: without_nulls(v) for k, v in value.items() if v is not None}
    return [without_nulls(v) for v in value] if isinstance(value, list) else value


def rules(schema: Any, value: Any, path: str = "") -> Iterator[tuple[str, str, Any]]:
    """``(path, CEL rule, value)`` of every rule of the schema that has a value; those on changes have none here."""
    if not isinstance(schema, dict):
        return
    for rule in schema.get("x-kubernetes-validations", []):
        if "oldSelf" not in rule["rule"]:
            yield path, rule["rule"], value
    if isinstance(value, dict):
        for key, inner in value.items():
            below = schema.get("properties", {}).get(key, schema.get("additionalProperties"))
            yield from rules(below, inner, f"{path}.{key}")
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from rules(schema.get("items"), inner, f"{path}.{index}")

"""Render ``clusters/kuberay/`` from the chart: what to apply where Helm is not wanted.

python helm/kuberay.py   (or: make kuberay)
"""

import json
from pathlib import Path
from typing import Any

import yaml
from helm_python.chart import Chart

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "clusters/kuberay"
NAME = "manta"

_OFF = {
    part: {"enabled": False} for part in ("cluster", "endpoint", "train", "search", "gc", "mlflow", "networkPolicy")
}
_SHARED = {**_OFF, "tracking": {"url": "http://mlflow:5000"}}
_GPU = {
    "name": "gpu",
    "replicas": 1,
    "minReplicas": 0,
    "maxReplicas": 4,
    "resources": {
        "requests": {"cpu": "8", "memory": "48Gi", "nvidia.com/gpu": 1},
        "limits": {"cpu": "8", "memory": "48Gi", "nvidia.com/gpu": 1},
    },
    "shm": "8Gi",
    "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
}
_NODES = {"head": {"schedulable": False}, "workerGroups": [_GPU]}


def files() -> dict[str, dict[str, Any]]:
    """Values of each file."""
    run = (ROOT / "jobs/runs/quickstart.yaml").read_text()
    search = (ROOT / "jobs/runs/search.yaml").read_text()
    storage = {"accessModes": ["ReadWriteMany"]}
    return {
        "raycluster.yaml": {**_SHARED, "storage": storage, "cluster": {"enabled": True, **_NODES}},
        "rayservice.yaml": {
            **_SHARED,
            "endpoint": {"enabled": True, "serving": {"base": "demo", "gpus": 1}, **_NODES},
        },
        "rayjob.yaml": {
            **_SHARED,
            "storage": storage,
            "cluster": {"enabled": False, **_NODES},
            "train": {"enabled": True, "run": run},
        },
        "raycronjob.yaml": {
            **_SHARED,
            "storage": storage,
            "cluster": {"enabled": False, **_NODES},
            "search": {"enabled": True, "run": search},
        },
    }


def render(name: str, chart: Chart) -> str:
    """One file: a Ray resource and what it refers to, without a namespace and without what is Helm's."""
    found = [
        document
        for template, text in sorted(chart.render(files()[name], name=NAME, namespace="default").items())
        if template.endswith(".yaml") and "/tests/" not in template
        for document in yaml.safe_load_all(text)
        if document
    ]
    everything = json.dumps(found)
    used = [d for d in found if d["kind"] != "ServiceAccount" or _account(d) in everything]
    used.sort(key=lambda d: d["apiVersion"].startswith("ray.io/"))  # after what it refers to
    for document in used:
        document["metadata"].pop("namespace")
        if document["metadata"].get("annotations", {}).pop("helm.sh/resource-policy", None):
            document["metadata"] = {k: v for k, v in document["metadata"].items() if v}
        for label in ("helm.sh/chart", "app.kubernetes.io/managed-by"):
            document["metadata"]["labels"].pop(label)
    head = "# Rendered from helm/orchestrator by `make kuberay`; change values in helm/kuberay.py, not here.\n---\n"
    return head + yaml.dump_all(used, Dumper=_Dumper, sort_keys=False, width=100)


class _Dumper(yaml.SafeDumper):
    """Run files as blocks, as they were written."""


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)


_Dumper.add_representer(str, _text)


def _account(document: dict[str, Any]) -> str:
    return f'"serviceAccountName": "{document["metadata"]["name"]}"'


def main() -> None:
    """Write the files."""
    FOLDER.mkdir(exist_ok=True)
    with Chart.load(ROOT / "helm/orchestrator") as chart:
        for name in files():
            (FOLDER / name).write_text(render(name, chart))


if __name__ == "__main__":
    main()

"""``clusters/`` and ``helm/``: configs of ``ray up`` by Ray's own check, rendered files that are up to date."""

import asyncio
import copy
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import helm_python
import httpx
import jsonschema
import pytest
import ray
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

import orchestrator
from helm import kuberay, readme
from tests import chart_kit as kit
from tests.test_chart import OWN, VERSIONS, core_mistakes, crd_mistakes
from tests.test_chart_links import not_restricted, references

CLUSTERS = kit.ROOT / "clusters"
CLOUDS = ("aws", "gcp")


def cloud(name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((CLUSTERS / f"{name}.yaml").read_text())
    return found


@pytest.mark.parametrize("name", CLOUDS)
def test_ray_takes_the_config(name):
    prepared = prepare_config(cloud(name))
    validate_config(prepared)
    # Nothing of Ray's defaults, such as its own image or node types, is left.
    assert set(prepared["available_node_types"]) == {"head", "gpu_spot", "gpu", "cpu_spot"}
    assert prepared["docker"]["image"].endswith(f"/manta:{orchestrator.__version__}-cuda")
    assert prepared["setup_commands"] == prepared["head_setup_commands"] == prepared["worker_setup_commands"] == []


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.update(max_worker=3),
        lambda c: c["available_node_types"]["gpu"].update(spot=True),
        lambda c: c.update(head_node_type="front"),
        lambda c: c["docker"].update(images="x"),
    ],
)
def test_ray_refuses_a_wrong_one(change):
    config = copy.deepcopy(cloud("aws"))
    change(config)
    with pytest.raises((jsonschema.ValidationError, ValueError, KeyError)):
        validate_config(prepare_config(config))


@pytest.mark.parametrize("name", CLOUDS)
def test_nodes_are_what_is_promised(name):
    config = cloud(name)
    types = config["available_node_types"]
    assert types["head"]["resources"] == {"CPU": 0}
    assert [t for t in types if types[t]["resources"].get("GPU")] == ["gpu_spot", "gpu"]
    spot = {t for t, v in types.items() if "spot" in str(v["node_config"]).lower()}
    assert spot == {"gpu_spot", "cpu_spot"}
    assert all(v["min_workers"] == 0 < v["max_workers"] for t, v in types.items() if t != "head")
    options = " ".join(config["docker"]["run_options"])
    for word in ("MANTA_AUTOSCALING=1", "RAY_AUTH_MODE=token", "MANTA_HOME=/mnt/manta", "/mnt/manta:/mnt/manta"):
        assert word in options
    assert any("/mnt/manta" in c and "mount" in c for c in config["initialization_commands"])
    assert "--autoscaling-config" in config["head_start_ray_commands"][-1]


@pytest.mark.parametrize("name", CLOUDS)
def test_no_secret_is_inside(name):
    assert secrets((CLUSTERS / f"{name}.yaml").read_text()) == []


def secrets(text: str) -> list[str]:
    """What looks like a secret in a file."""
    named = r"(?:TOKEN|PASSWORD|SECRET|ACCESS_KEY|API_KEY)[A-Z_]*[=:]\s*\S+"
    return re.findall(rf"{named}|AKIA[0-9A-Z]{{16}}|://[^/\s]*:[^/\s]*@|PRIVATE KEY", text)


@pytest.mark.parametrize("text", ["HF_TOKEN=abc", "AKIA" + "A" * 16, "postgresql://u:p@h/d"])
def test_a_secret_is_seen(text):
    assert secrets(text)


# ---- rendered files


@pytest.mark.parametrize("name", kuberay.files())
def test_kuberay_files_are_those_of_the_chart(name):
    with kit.Chart.load(kit.CHART) as chart:
        assert (CLUSTERS / "kuberay" / name).read_text() == kuberay.render(name, chart), "run `make kuberay`"


def test_no_other_file_lies_there():
    assert {p.name for p in (CLUSTERS / "kuberay").iterdir()} == set(kuberay.files())


@pytest.mark.parametrize("name", kuberay.files())
def test_kuberay_files_stand_alone(name):
    found = list(yaml.safe_load_all((CLUSTERS / "kuberay" / name).read_text()))
    kinds = {"raycluster": "RayCluster", "rayservice": "RayService", "rayjob": "RayJob", "raycronjob": "RayCronJob"}
    assert sum(d["kind"] == kinds[name.removesuffix(".yaml")] for d in found) == 1
    assert {r for d in found for r in references(d)} == {
        (d["kind"], d["metadata"]["name"]) for d in found if d["kind"] not in kinds.values()
    }
    for document in found:
        assert [m for _, pod in kit.pods(document) for m in not_restricted(pod)] == []
        if document["apiVersion"] not in OWN:
            assert core_mistakes(document, VERSIONS[0]) == []


@pytest.mark.parametrize("name", kuberay.files())
def test_kuberay_files_fit_the_definitions(name):
    for document in yaml.safe_load_all((CLUSTERS / "kuberay" / name).read_text()):
        if document["apiVersion"] in OWN:
            assert crd_mistakes(document) == []


def test_the_list_of_values_is_that_of_the_chart():
    values = (kit.CHART / "values.yaml").read_text()
    text = (kit.CHART / "README.md").read_text()
    assert readme.updated(text, values) == text, "run `make kuberay`"


def test_every_value_is_described():
    text = (kit.CHART / "values.yaml").read_text()
    described = {entry.path for entry in readme.entries(text) if entry.comment}
    leaves = {entry.path for entry in readme.entries(text) if not entry.section}
    assert leaves <= described
    # What has a described neighbour is described itself: nothing falls out of the list.
    values = yaml.safe_load(text)

    def missed(value: Any, path: tuple[str, ...]) -> list[str]:
        inner = [(*path, key) for key in value] if isinstance(value, dict) else []
        seen = {p[: len(path) + 1] for p in described}
        if not any(p in seen for p in inner):
            return []
        return [".".join(p) for p in inner if p not in seen] + [m for p in inner for m in missed(value[p[-1]], p)]

    # The endpoint's head has what `cluster.head` has, by YAML's own means.
    assert missed(values, ()) == []


def test_an_undescribed_value_is_seen():
    found = {e.path: e.comment for e in readme.entries("# A.\na: 1\nb:\n  # C.\n  c: 2\n  d: 3\n")}
    assert found == {("a",): "A.", ("b",): "", ("b", "c"): "C."}


# ---- what is said of them


def test_helm_commands_of_the_readme_render():
    text = (kit.ROOT / "README.md").read_text()
    commands = [shlex.split(line) for line in re.findall(r"^helm (?:install|upgrade) .*", text, re.M)]
    assert len(commands) == 2
    values: kit.Values = {}
    for command in commands:
        assert command[3] == "helm/orchestrator"
        for option, value in itertools.pairwise(command):
            name, _, given = value.partition("=")
            section, _, key = name.partition(".")
            if option == "--values":
                values = kit.merged(values, yaml.safe_load((kit.ROOT / value).read_text()))
            elif option == "--set-file":
                values = kit.merged(values, {section: {key: (kit.ROOT / given).read_text()}})
            elif option == "--set":
                values = kit.merged(values, {section: {key: yaml.safe_load(given)}})
        kinds = {d["kind"] for d in kit.render(values)}
        assert ("RayJob" in kinds) is ("train" in values)
    assert "train" in values


# ---- scripts


@pytest.mark.parametrize("script", ["clusters/local.sh", "clusters/kind.sh", ".ci/run"])
def test_scripts_parse(script):
    subprocess.run(["bash", "-n", kit.ROOT / script], check=True)


@pytest.mark.parametrize("there", [True, False])
def test_ci_says_where_the_definitions_are_if_they_are_there(tmp_path, there):
    (tmp_path / "checkout/.ci").mkdir(parents=True)
    shutil.copy(kit.ROOT / ".ci/run", tmp_path / "checkout/.ci/run")
    (tmp_path / "bin").mkdir()
    make = tmp_path / "bin/make"
    make.write_text('#!/bin/sh\necho "$1 ${MANTA_CRD_SCHEMAS-unset}"\n')
    make.chmod(0o755)
    if there:
        (tmp_path / "shared/kuberay").mkdir(parents=True)
    env = {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}
    ran = subprocess.run(["bash", tmp_path / "checkout/.ci/run"], env=env, capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["test", str(tmp_path / "shared/kuberay") if there else "unset"]


def test_what_was_not_run_says_so():
    assert "NOT RUN SO FAR" in (CLUSTERS / "kind.sh").read_text()
    assert all("not run so far" in (CLUSTERS / f"{name}.yaml").read_text() for name in CLOUDS)
    said = (kit.ROOT / "helm/README.md").read_text()
    assert "No live Kubernetes" in said
    assert all(version.rpartition(".")[0] in said for version in VERSIONS)
    assert helm_python.helm_sdk_version() in said
    assert len(kit.CASES) == 8
    assert "Eight sets of values" in said


# ---- the dashboard


def endpoint_metrics() -> set[str]:
    """What the endpoint's own page of metrics names."""
    from orchestrator.serve.http import build
    from orchestrator.serve.request import Stats

    class Tokenizer:
        bos_token_id = None

        def __call__(self, text: str) -> dict[str, list[int]]:
            return {"input_ids": [1]}

    async def page() -> str:
        app = build(SimpleNamespace(stats=Stats()), SimpleNamespace(models=dict), Tokenizer())
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app)) as client:
            return (await client.get("http://endpoint/metrics")).text

    return set(re.findall(r"^(manta_\w+) ", asyncio.run(page()), re.M))


def unknown_metrics(dashboard: str) -> set[str]:
    """Metrics of a dashboard that neither the endpoint nor Ray has."""
    folder = Path(ray.__file__).parent
    sources = [*folder.glob("dashboard/modules/metrics/dashboards/*.py"), *folder.glob("serve/_private/*.py")]
    sources += [
        folder / "dashboard/modules/reporter/reporter_agent.py",
        *folder.glob("train/v2/_internal/metrics/*.py"),
    ]
    text = "\n".join(path.read_text() for path in sources)
    used = set(re.findall(r"\b(?:ray|manta)_[a-z_]+(?=\{)", dashboard))
    assert used
    known = {name for name in used if re.search(rf"\b(?:ray_)?{name.removeprefix('ray_')}\b", text)}
    return used - known - endpoint_metrics()


def test_the_dashboards_metrics_exist():
    text = (kit.CHART / "dashboards/manta.json").read_text()
    assert unknown_metrics(text) == set()
    assert unknown_metrics("ray_node_gpus_use{} manta_losses{}") == {"ray_node_gpus_use", "manta_losses"}
    panels = json.loads(text)["panels"]
    assert len({p["id"] for p in panels}) == len(panels)

"""The chart: rendered by Helm's engine, linted, and every document checked against the schemas of its kind."""

import json
import re
from functools import cache
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from cel import evaluate
from helm_python.chart import lint, package
from helm_python.errors import HelmError
from packaging.version import Version

from tests import chart_kit as kit
from tests.chart_kit import CASES, CHART, documents, name_of

OWN = ("ray.io/v1", "monitoring.coreos.com/v1")
OLDEST = "1.29"


@pytest.mark.parametrize("case", CASES)
def test_lint(case):
    report = lint(CHART, kit.values_of(case), strict=True)
    assert report["errors"] == []
    assert [m for m in report["messages"] if m["severity"] > 1] == []


@cache
def _core_validator(version: str, kind: str, api: str) -> Any:
    """kubernetes-validate's strict schema of a kind; its own call reads all definitions anew for each document."""
    from kubernetes_validate.utils import Registry, Resource, schema_contents

    group = re.sub(r"^([^./]*)(?:\.[^/]*)?/", r"\1-", api)
    folder = f"kubernetes-json-schema/v{version}-local-strict"
    schema = schema_contents(f"{folder}/{kind.lower()}-{group}.json", version)
    registry = Registry()
    for contents in (schema, _definitions(version)):
        registry = Resource.from_contents(contents) @ registry
    return jsonschema.Draft202012Validator(schema, registry=registry)


@cache
def _definitions(version: str) -> Any:
    from kubernetes_validate.utils import schema_contents

    return schema_contents(f"kubernetes-json-schema/v{version}-local-strict/_definitions.json", version)


def core_mistakes(document: kit.Document, version: str) -> list[str]:
    validator = _core_validator(version, document["kind"], document["apiVersion"])
    return [f"{name_of(document)} {e.json_path}: {e.message[:200]}" for e in validator.iter_errors(document)]


VERSIONS = [
    next(v for v in kubernetes_validate.utils.all_versions() if v.startswith(OLDEST)),
    kubernetes_validate.latest_version(),
]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("case", CASES)
def test_core_documents_fit_kubernetes(case, version):
    core = [d for d in documents(case) if d["apiVersion"] not in OWN]
    assert core
    assert [m for d in core for m in core_mistakes(d, version)] == []


def test_the_package_itself_agrees():
    # Its own call, once: what is checked above is what it checks.
    (ingress,) = [d for d in documents("everything") if d["kind"] == "Ingress"]
    assert kubernetes_validate.validate(ingress, VERSIONS[0], strict=True) == OLDEST
    ingress["spec"]["rules"][0]["hosts"] = "x"
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(ingress, VERSIONS[0], strict=True)
    assert core_mistakes(ingress, VERSIONS[0])


def test_oldest_version_is_the_charts():
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["kubeVersion"] == f">={OLDEST}.0-0"
    assert Version(OLDEST) < Version(VERSIONS[-1])


def crd_mistakes(document: kit.Document) -> list[str]:
    schema = kit.crd_schema(kit.crd_folder(), document)
    value = kit.without_nulls(document)
    checked = jsonschema.Draft7Validator(kit.strict(schema))
    said = [f"{name_of(document)} {e.json_path}: {e.message[:200]}" for e in checked.iter_errors(value)]
    for path, rule, inner in kit.rules(schema, value):
        if not evaluate(rule, {"self": inner}):
            said.append(f"{name_of(document)} {path}: {rule}")
    return said


@pytest.mark.parametrize("case", CASES)
def test_own_resources_fit_their_definitions(case):
    found = [d for d in documents(case) if d["apiVersion"] in OWN]
    assert found or case == "nothing"
    assert [m for d in found for m in crd_mistakes(d)] == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda spec: spec["headGroupSpec"].update(templates={}), "'templates' was unexpected"),
        (lambda spec: spec["headGroupSpec"].pop("template"), "'template' is a required property"),
        (lambda spec: spec["gcsFaultToleranceOptions"].update(backend="etcd"), "'etcd' is not one of"),
        (lambda spec: spec.update(managedBy="me"), "self in ['ray.io/kuberay-operator'"),
        (lambda spec: spec["autoscalerOptions"].update(idleTimeoutSeconds="60"), "is not of type 'integer'"),
    ],
)
def test_a_wrong_resource_is_seen(change, said):
    (cluster,) = [d for d in documents("everything") if d["kind"] == "RayCluster"]
    assert crd_mistakes(cluster) == []
    change(cluster["spec"])
    assert said in "\n".join(crd_mistakes(cluster))


def test_a_rule_of_the_definitions_is_evaluated():
    (cluster,) = [d for d in documents("everything") if d["kind"] == "RayCluster"]
    assert list(kit.rules(kit.crd_schema(kit.crd_folder(), cluster), cluster))
    (job,) = [d for d in documents("everything") if d["kind"] == "RayJob"]
    job["spec"]["deletionStrategy"] = {"onSuccess": {"policy": "DeleteCluster"}}
    assert any("onFailure" in mistake for mistake in crd_mistakes(job))


# ---- wrong values


def refused(values: kit.Values) -> str:
    with pytest.raises(HelmError) as caught:
        kit.render(values)
    return str(caught.value)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"clusterr": {}}, "clusterr"),
        ({"endpoint": {"replica": 2}}, r"/endpoint.*replica"),
        ({"endpoint": {"serving": {"row": 4}}}, r"/endpoint/serving.*row"),
        ({"endpoint": {"serving": {"rows": 0}}}, r"/endpoint/serving/rows.*minimum"),
        ({"endpoint": {"serving": {"port": 80}}}, r"/endpoint/serving.*port"),
        ({"auth": {"mode": "password"}}, r"/auth/mode"),
        ({"auth": {"token": "abc"}}, r"/auth.*token"),
        ({"gcs": {"backend": "etcd"}}, r"/gcs/backend"),
        ({"image": {"cpu": {"tag": "latest"}}}, r"/image/cpu/tag"),
        ({"image": {"cpu": {"digest": "sha256:1"}}}, r"/image/cpu/digest"),
        ({"cluster": {"head": {"resources": {"limits": {"cpu": "1"}}}, "workerGroups": [{}]}}, r"/workerGroups/0"),
        ({"storage": {"size": "ten"}}, r"/storage/size"),
        ({"storage": {"accessModes": ["RWX"]}}, r"/storage/accessModes/0"),
        ({"attribution": {"team": "a b"}}, r"/attribution/team"),
        ({"tracking": {"url": "https://user:word@host"}}, r"/tracking/url"),
        ({"mlflow": {"artifacts": {"destination": "s3://key:word@b"}}}, r"/mlflow/artifacts/destination"),
        ({"pods": {"env": [{"name": "HF_TOKEN", "value": "x"}]}}, r"/pods/env/0/name"),
        ({"gc": {"schedule": "daily"}}, r"/gc/schedule"),
        ({"gc": {"keep": -1}}, r"/gc/keep"),
        ({"train": {"overrides": ["a='; rm -rf /'"]}}, r"/train/overrides/0"),
        ({"fullnameOverride": "Manta_1"}, r"/fullnameOverride"),
        ({"monitoring": {"interval": "30"}}, r"/monitoring/interval"),
        ({"networkPolicy": {"jobClients": [{"pods": {}}]}}, r"/networkPolicy/jobClients/0"),
        # what does not go together
        ({"tracking": {"url": "http://x"}}, "tracking.url: set, while mlflow.enabled"),
        ({"mlflow": {"enabled": False}}, "tracking.url: needed"),
        ({"mlflow": {"replicas": 2}}, "mlflow.backend.existingSecret: needed"),
        ({"mlflow": {"replicas": 2, "backend": {"existingSecret": "a"}}}, "mlflow.artifacts.destination: needed"),
        ({"endpoint": {"replicas": {"min": 3}}}, "endpoint.replicas.min: 3 is above"),
        ({"endpoint": {"head": {"schedulable": False}}}, "endpoint.workerGroups: empty"),
        ({"cluster": {"head": {"schedulable": False}}}, "cluster.workerGroups: empty"),
        ({"endpoint": {"enabled": False}, "ingress": {"enabled": True, "host": "h"}}, "ingress.enabled: needs"),
        ({"ingress": {"enabled": True}}, "ingress.host: needed"),
        ({"endpoint": {"drainSeconds": 600}}, "pods.terminationGracePeriodSeconds: 180 is below"),
        ({"train": {"enabled": True}, "cluster": {"enabled": False}}, "train.run: needed"),
        ({"cluster": {"workerGroups": [kit.GPU]}}, "storage.accessModes: ReadWriteMany is needed"),
        ({"cluster": {"workerGroups": [kit.GPU]}, "storage": {"enabled": False}}, "storage.enabled: needed"),
        ({"endpoint": {"workerGroups": [kit.GPU, kit.GPU]}}, 'endpoint.workerGroups.1.name: "gpu" is given twice'),
        ({"endpoint": {"workerGroups": [{**kit.GPU, "replicas": 9}]}}, "endpoint.workerGroups.0.replicas: 9 is not"),
        ({"gcs": {"backend": "redis"}}, "gcs.redis.address: needed"),
        ({"serviceAccount": {"create": False}}, "serviceAccount.name: needed"),
    ],
    ids=json.dumps,
)
def test_wrong_values_are_refused_with_their_path(values, said):
    assert re.search(said, refused(values), re.S), refused(values)


def test_every_value_is_in_the_schema_and_back():
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    schema = json.loads((CHART / "values.schema.json").read_text())

    def differences(value: Any, spec: Any, path: str) -> list[str]:
        if "$ref" in spec:
            spec = schema["$defs"][spec["$ref"].rpartition("/")[2]]
        if "properties" not in spec or path == ".endpoint.serving":
            return []
        assert spec["additionalProperties"] is False, path
        said = [f"{path}.{key}" for key in set(value) ^ set(spec["properties"])]
        return said + [
            d for k, v in value.items() for d in differences(v, spec["properties"].get(k, {}), f"{path}.{k}")
        ]

    # `resources` is open at the top; Helm itself puts `global` there.
    assert sorted(differences(values, schema, "")) == [".global"]


def test_endpoints_keys_are_those_of_the_config():
    from orchestrator.config import Serving

    schema = json.loads((CHART / "values.schema.json").read_text())
    assert set(schema["$defs"]["serving"]["properties"]) == set(Serving.model_fields) - {"name", "host", "port"}


def test_run_files_arrive_as_they_are(tmp_path):
    found = {name_of(d): d["data"]["run.yaml"] for d in documents("everything") if "run.yaml" in d.get("data", {})}
    assert found == {"ConfigMap/manta-train": kit.RUN, "ConfigMap/manta-search": kit.SEARCH}
    (dashboard,) = [d for d in documents("everything") if name_of(d) == "ConfigMap/manta-dashboard"]
    assert json.loads(dashboard["data"]["manta.json"]) == json.loads((CHART / "dashboards/manta.json").read_text())


def test_the_package_renders_as_the_folder(tmp_path):
    archive = package(CHART, destination=tmp_path)
    with kit.Chart.load(archive) as chart:
        names = {f["name"] for f in chart.files}
        assert {"README.md", "values-production.yaml", "dashboards/manta.json"} <= names
        values = kit.values_of("production")
        assert chart.render(values, name=kit.RELEASE, namespace=kit.NAMESPACE) == kit.texts(values)

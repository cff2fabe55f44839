"""What schemas do not see in the chart: names meet, pods are confined, labels arrive, secrets stay out."""

import re
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from orchestrator.config.load import load_run, load_serving
from orchestrator.config.strict import Strict
from tests import chart_kit as kit
from tests.chart_kit import CASES, containers, documents, name_of, pods

INSTANCE, COMPONENT = "app.kubernetes.io/instance", "app.kubernetes.io/component"
FROM_OUTSIDE = {
    "Secret": {"cloud", "postgres", "s3", "hub", "ray-token", "redis", "certificate", "pull", "mlflow-login"}
    | {"manta-postgres", "manta-artifacts", "manta-hub", "manta-redis", "manta-certificate"}
    | {"manta"},  # the token that KubeRay makes for the RayCluster of this name
    "PersistentVolumeClaim": {"shared", "bases"},
    "ServiceAccount": {"ours"},
    "ConfigMap": set(),
}
"""What the values say is there already."""


def walk(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    yield path, value
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in pairs:
        yield from walk(inner, f"{path}.{key}")


def references(document: kit.Document) -> Iterator[tuple[str, str]]:
    """``(kind, name)`` of everything that a document names."""
    for path, value in walk(document):
        key = path.rpartition(".")[2]
        if key in ("secretKeyRef", "secretRef"):
            yield "Secret", value["name"]
        elif key == "secretName" or (".imagePullSecrets." in path and key == "name"):
            yield "Secret", value
        elif key == "claimName":
            yield "PersistentVolumeClaim", value
        elif key == "configMap" and "name" in value:
            yield "ConfigMap", value["name"]
        elif key == "serviceAccountName":
            yield "ServiceAccount", value


@pytest.mark.parametrize("case", CASES)
def test_what_is_named_is_there(case):
    found = documents(case)
    there = {(d["kind"], d["metadata"]["name"]) for d in found}
    outside = {(kind, name) for kind, names in FROM_OUTSIDE.items() for name in names}
    named = {r for d in found for r in references(d)}
    assert named
    assert named - there - outside == set()


@pytest.mark.parametrize("case", CASES)
def test_nothing_is_made_for_nobody(case):
    found = documents(case)
    named = {r for d in found for r in references(d)}
    made = {(d["kind"], d["metadata"]["name"]) for d in found if d["kind"] in FROM_OUTSIDE}
    made -= {("ConfigMap", "manta-dashboard")}  # Grafana finds it by its label
    unused = made - named
    if case == "nothing":  # its test uses one account
        unused -= {("ServiceAccount", f"manta-{role}") for role in ("head", "worker")}
    workerless = not any(what.startswith("worker") for d in found for what, _ in pods(d))
    assert unused <= ({("ServiceAccount", "manta-worker")} if workerless else set())


def test_names_are_unique():
    for case in CASES:
        names = [name_of(d) for d in documents(case)]
        assert len(names) == len(set(names))


def selectors(document: kit.Document) -> Iterator[tuple[str, dict[str, str]]]:
    spec = document.get("spec", {})
    kind = document["kind"]
    if kind == "Service":
        yield "selector", spec["selector"]
    elif kind in ("Deployment", "PodDisruptionBudget", "PodMonitor"):
        yield "selector", spec["selector"]["matchLabels"]
    elif kind == "NetworkPolicy":
        yield "podSelector", spec["podSelector"]["matchLabels"]
        for rule in spec["ingress"]:
            for peer in rule["from"]:
                labels = peer.get("podSelector", {}).get("matchLabels", {})
                # The operator is another release's; the test's pod is there only while it runs, but is a document.
                if labels and "namespaceSelector" not in peer:
                    yield "from", labels


def labels_in_the_cluster(found: list[kit.Document]) -> list[dict[str, str]]:
    """Labels of every pod, with those that KubeRay adds."""
    out = []
    for document in found:
        for what, pod in pods(document):
            own = dict(pod["metadata"]["labels"])
            if what.split()[0] in ("head", "worker"):
                own["ray.io/node-type"] = what.split()[0]
            out.append(own)
    return out


@pytest.mark.parametrize("case", CASES)
def test_selectors_find_pods(case):
    found = documents(case)
    there = labels_in_the_cluster(found)
    for document in found:
        for where, wanted in selectors(document):
            assert any(wanted.items() <= labels.items() for labels in there), (name_of(document), where, wanted)
            assert wanted[INSTANCE] == kit.RELEASE


def test_services_ports_are_the_containers():
    for case in CASES:
        for document in documents(case):
            if document["kind"] != "Service":
                continue
            (pod,) = [p for d in documents(case) if d["kind"] == "Deployment" for _, p in pods(d)]
            open_ports = {p["name"] for c in containers(pod) for p in c["ports"]}
            assert {p["targetPort"] for p in document["spec"]["ports"]} <= open_ports


@pytest.mark.parametrize("case", ["defaults", "everything", "production"])
def test_urls_lead_to_services(case):
    found = documents(case)
    services = {d["metadata"]["name"] for d in found if d["kind"] == "Service"}
    for document in found:
        if document["kind"] == "RayCluster":
            services.add(f"{document['metadata']['name']}-head-svc")  # KubeRay's
        elif document["kind"] == "RayService":
            services.add(document["spec"]["serveService"]["metadata"]["name"])
    hosts = set(re.findall(r"http://([a-z0-9-]+):\d+", str(found)))
    assert {"manta-mlflow", "manta-head-svc", "manta-endpoint"} <= hosts
    assert hosts <= services
    for ingress in (d for d in found if d["kind"] == "Ingress"):
        (path,) = ingress["spec"]["rules"][0]["http"]["paths"]
        assert path["backend"]["service"]["name"] in services


def test_monitors_find_the_endpoints_service():
    found = documents("everything")
    (service,) = [d["spec"]["serveService"] for d in found if d["kind"] == "RayService"]
    (monitor,) = [d for d in found if d["kind"] == "ServiceMonitor"]
    assert monitor["spec"]["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    for pod_monitor in (d for d in found if d["kind"] == "PodMonitor"):
        wanted = {e["port"] for e in pod_monitor["spec"]["podMetricsEndpoints"]}
        chosen = pod_monitor["spec"]["selector"]["matchLabels"]
        for document in found:
            for what, pod in pods(document):
                if what != "submitter" and chosen.items() <= pod["metadata"]["labels"].items():
                    assert wanted <= {p["name"] for c in containers(pod) for p in c.get("ports", [])}


@pytest.mark.parametrize("case", CASES)
def test_every_mount_is_a_volume_and_every_volume_mounted(case):
    for document in documents(case):
        for what, pod in pods(document):
            volumes = {v["name"] for v in pod["spec"].get("volumes", [])}
            mounts = {m["name"] for c in containers(pod) for m in c.get("volumeMounts", [])}
            assert mounts == volumes, (name_of(document), what)


# ---- confinement: the Pod Security Standard "restricted", https://kubernetes.io/docs/concepts/security/


def not_restricted(pod: kit.Document) -> list[str]:
    spec = pod["spec"]
    said = [f"pod: {key}" for key in ("hostNetwork", "hostPID", "hostIPC") if spec.get(key)]
    if spec["securityContext"].get("seccompProfile") != {"type": "RuntimeDefault"}:
        said.append("pod: seccompProfile")
    allowed = {"configMap", "emptyDir", "persistentVolumeClaim", "projected", "secret", "downwardAPI", "csi"}
    said += [f"volume {v['name']}" for v in spec.get("volumes", []) if not (set(v) - {"name"} <= allowed)]
    for container in containers(pod):
        context = container.get("securityContext", {})
        right = {
            "allowPrivilegeEscalation": False,
            "privileged": False,
            "runAsNonRoot": True,
            "capabilities": {"drop": ["ALL"]},
        }
        said += [f"{container['name']}: {key}" for key, value in right.items() if context.get(key) != value]
        if not context.get("runAsUser"):
            said.append(f"{container['name']}: runAsUser")
        for kind in ("requests", "limits"):
            if not {"cpu", "memory"} <= set(container.get("resources", {}).get(kind, {})) and kind == "limits":
                said.append(f"{container['name']}: {kind}")
        if any(p.get("hostPort") for p in container.get("ports", [])):
            said.append(f"{container['name']}: hostPort")
    return said


@pytest.mark.parametrize("case", CASES)
def test_every_pod_is_restricted_and_has_limits(case):
    checked = [pod for d in documents(case) for _, pod in pods(d)]
    assert checked
    assert [m for pod in checked for m in not_restricted(pod)] == []
    for document in documents(case):
        for cluster in kit.ray_specs(document):
            if "autoscalerOptions" in cluster:
                options = {"name": "autoscaler", **cluster["autoscalerOptions"]}
                pod = {"spec": {"securityContext": {"seccompProfile": {"type": "RuntimeDefault"}}}}
                assert not_restricted({"spec": {**pod["spec"], "containers": [options]}}) == []


def test_a_loose_pod_is_seen():
    (pod,) = [p for d in documents("defaults") if d["kind"] == "Deployment" for _, p in pods(d)]
    del pod["spec"]["containers"][0]["securityContext"]["capabilities"]
    del pod["spec"]["containers"][0]["resources"]["limits"]
    pod["spec"]["volumes"].append({"name": "host", "hostPath": {"path": "/"}})
    assert not_restricted(pod) == ["volume host", "mlflow: capabilities", "mlflow: limits"]


@pytest.mark.parametrize("case", CASES)
def test_only_a_head_with_an_autoscaler_holds_a_token(case):
    for document in documents(case):
        autoscaled = {id(c["headGroupSpec"]["template"]) for c in kit.ray_specs(document) if "autoscalerOptions" in c}
        for _, pod in pods(document):
            assert pod["spec"]["automountServiceAccountToken"] is (id(pod) in autoscaled)
        if document["kind"] == "ServiceAccount":
            assert document["automountServiceAccountToken"] is False
        assert document["kind"] not in ("Role", "ClusterRole", "RoleBinding", "ClusterRoleBinding")


# ---- labels


def test_labels_and_annotations_arrive_everywhere():
    wanted = {"example.com/env": "test", "manta/owner": "ada", "manta/team": "nlp", "manta/cost-center": "cc-1"}
    noted = {"example.com/contact": "team@example.com"}
    for document in documents("everything"):
        assert wanted.items() <= document["metadata"]["labels"].items(), name_of(document)
        assert noted.items() <= document["metadata"]["annotations"].items(), name_of(document)
        assert document["metadata"]["labels"][INSTANCE] == kit.RELEASE
        for what, pod in pods(document):
            if document["kind"] != "Pod":
                assert {**wanted, "pod-label": "x"}.items() <= pod["metadata"]["labels"].items(), (document, what)
                assert {**noted, "pod-note": "x"}.items() <= pod["metadata"]["annotations"].items()
                assert COMPONENT in pod["metadata"]["labels"]
            assert pod["spec"]["nodeSelector"]["pool"] in ("ray", "heads")
            assert {"key": "ray", "operator": "Exists"} in pod["spec"]["tolerations"]
            if what.startswith("worker"):
                assert pod["metadata"]["labels"]["kind"] == "spot"
                assert pod["spec"]["priorityClassName"] == "batch"


def test_queues_take_what_they_admit():
    queued = {d["kind"] for d in documents("everything") if "kueue.x-k8s.io/queue-name" in d["metadata"]["labels"]}
    assert queued == {"RayCluster", "RayService", "RayJob", "RayCronJob"}


def test_pods_labels_hold_no_version():
    # A label that changes with the chart would roll every Ray cluster at each upgrade of the chart.
    version = yaml.safe_load((kit.CHART / "Chart.yaml").read_text())["version"]
    for document in documents("everything"):
        for _, pod in pods(document):
            if document["kind"] != "Pod":
                assert not [k for k, v in pod["metadata"]["labels"].items() if version in v or "chart" in k]


# ---- secrets


@pytest.mark.parametrize("case", CASES)
def test_no_secret_is_inlined(case):
    for document in documents(case):
        assert document["kind"] != "Secret"
        for path, value in walk(document):
            if isinstance(value, dict) and re.search("TOKEN|PASSWORD|SECRET|_KEY", str(value.get("name", ""))):
                assert "value" not in value, path
            if isinstance(value, str):
                assert not re.search(r"://[^/\s]*:[^/\s]*@", value), path


# ---- what runs inside


def test_the_endpoints_config_is_one_the_application_takes():
    from ray.serve.schema import ServeDeploySchema

    for case in ("defaults", "gpu", "production", "everything"):
        (service,) = [d for d in documents(case) if d["kind"] == "RayService"]
        config = yaml.safe_load(service["spec"]["serveConfigV2"])
        parsed = ServeDeploySchema.model_validate(config)
        assert parsed.http_options.host == "0.0.0.0"
        assert parsed.http_options.port in {p["containerPort"] for p in _head(service)["ports"]}
        (application,) = config["applications"]
        settings = [f"{k}={yaml.safe_dump(v, default_flow_style=True)}" for k, v in application["args"].items()]
        assert isinstance(load_serving(None, settings), Strict)
        module, _, name = application["import_path"].partition(":")
        assert callable(getattr(__import__(module, fromlist=[name]), name))


def _head(service: kit.Document) -> kit.Document:
    (container,) = service["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]["containers"]
    return container


def test_the_endpoints_deployment_is_the_applications():
    from orchestrator.launch.serve import app

    application = app({"base": "demo", "gpus": 0})
    (service,) = [d for d in documents("everything") if d["kind"] == "RayService"]
    (configured,) = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"][0]["deployments"]
    assert configured["name"] == application._bound_deployment.name


def test_jobs_words_are_settings_of_a_run(tmp_path):
    (job,) = [d for d in documents("everything") if d["kind"] == "RayJob"]
    program, command, path, *settings = job["spec"]["entrypoint"].split()
    assert (program, command, path) == ("manta", "train", "/etc/manta/run.yaml")
    file = tmp_path / "run.yaml"
    file.write_text(kit.RUN)
    run = load_run(file, [s.strip("'") for s in settings])
    assert run.tracking.owner == "ada"
    assert run.tracking.tags == {"team": "nlp", "cost_center": "cc-1"}
    assert run.method.rank == 32
    head = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    assert {"name": "run", "mountPath": "/etc/manta", "readOnly": True} in head["volumeMounts"]


def test_commands_exist():
    import typer.main

    from orchestrator.cli import app

    known = typer.main.get_command(app)
    seen = set()
    for document in (d for case in CASES for d in documents(case)):
        for container in (c for _, pod in pods(document) for c in containers(pod)):
            for words in re.findall(r"\bmanta ([a-z][^&|;]*)", " ".join(container.get("command", []))):
                command, *rest = words.split()
                part = known.commands[command]
                if command == "deltas":
                    part = part.commands[rest.pop(0)]
                assert {w.partition("=")[0] for w in rest if w[0] == "-"} <= {o for p in part.params for o in p.opts}
                seen.add(command)
    assert seen == {"doctor", "deltas", "chat"}


def test_versions_are_the_projects():
    import orchestrator

    chart = yaml.safe_load((kit.CHART / "Chart.yaml").read_text())
    assert chart["appVersion"] == orchestrator.__version__
    values = yaml.safe_load((kit.CHART / "values.yaml").read_text())
    assert f"ray=={values['ray']['version']}" in (kit.ROOT / "constraints.txt").read_text().split()


def test_notes_name_what_is_there():
    notes = next(t for n, t in kit.texts({}).items() if n.endswith("NOTES.txt"))
    assert "svc/manta-endpoint 8000" in notes
    assert "svc/manta-head-svc 8265" in notes
    assert "get secret manta " in notes
    quiet = {"auth": {"mode": "disabled"}, "endpoint": {"enabled": False}}
    notes = next(t for n, t in kit.texts(quiet).items() if n.endswith("NOTES.txt"))
    assert "secret" not in notes
    assert "manta-endpoint" not in notes

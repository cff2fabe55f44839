"""The preflight finds what is wrong on a machine made to be wrong, and says what to do."""

import io
import sys
import types
from collections.abc import Iterable
from importlib import metadata
from socket import socket

import pytest
from packaging.requirements import Requirement
from rich.console import Console

from orchestrator import doctor
from orchestrator.base.memory import host_memory
from orchestrator.doctor import Finding
from orchestrator.errors import ClusterError

OFFERS = {
    "nodes": 2,
    "cpus": 4.0,
    "gpus": 0.0,
    "ray": metadata.version("ray"),
    "python": "{}.{}.{}".format(*sys.version_info),
}


def only(findings: Iterable[Finding]) -> Finding:
    (finding,) = findings
    return finding


def levels(findings: Iterable[Finding]) -> list[str]:
    return [finding.level for finding in findings]


def examined(address: str | None = None) -> tuple[bool, str]:
    out = io.StringIO()
    return doctor.examine(address, Console(file=out, width=200)), out.getvalue()


def test_report_and_answer_agree():
    good, text = examined()
    assert good == ("Nothing would stop a run." in text)
    assert good != any(line.startswith("stop") for line in text.splitlines())
    assert f"torch {metadata.version('torch')}" in text
    assert "none named" in text


def test_a_home_that_cannot_be_written_stops(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("MANTA_HOME", str(tmp_path / "file"))
    good, text = examined()
    assert not good
    assert "set MANTA_HOME" in text


@pytest.mark.parametrize(
    ("wanted", "level", "text"),
    [
        ("torch>=2.11,<2.14", "good", "torch 2.13.0+cpu"),
        ("torch<2.13", "stop", "outside"),
        ("none_such", "stop", "not"),
    ],
)
def test_versions(wanted, level, text):
    finding = only(doctor.compare([Requirement(wanted)], {"torch": "2.13.0+cpu"}))
    assert finding.level == level
    assert text in finding.text
    assert bool(finding.advice) == (level == "stop")


def test_this_installation_is_in_its_ranges():
    assert set(levels(doctor.versions())) == {"good"}


def test_names_are_compared_as_pip_does():
    assert only(doctor.compare([Requirement("Ruamel_Yaml.clib>=1")], {"ruamel-yaml-clib": "1.0"})).level == "good"


def test_a_package_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(doctor, "DISTRIBUTION", "no-such-thing")
    assert only(doctor.versions()).level == "stop"


def test_a_taken_port():
    with socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        taken = only(doctor.ports({port: "the endpoint"}))
    assert (taken.level, bool(taken.advice)) == ("warn", True)
    assert str(port) in taken.text
    assert only(doctor.ports({port: "the endpoint"})).level == "good"


def test_no_compiler(monkeypatch):
    monkeypatch.setenv("CC", "no-such-compiler")
    assert only(doctor.compiler()).level == "warn"
    monkeypatch.setenv("CC", sys.executable)
    assert only(doctor.compiler()).level == "good"


def test_shared_memory(tmp_path):
    assert only(doctor.shared_memory(str(tmp_path / "none"))).level == "warn"
    assert only(doctor.shared_memory(str(tmp_path), need=1 << 60)).level == "warn"
    assert only(doctor.shared_memory(str(tmp_path), need=1)).level == "good"


def test_little_memory(monkeypatch):
    monkeypatch.setattr(doctor, "host_memory", lambda: (1 << 33, 1 << 28))
    assert only(doctor.memory()).level == "stop"


def test_a_containers_limit_counts(tmp_path):
    (tmp_path / "memory.max").write_text("1073741824\n")
    (tmp_path / "memory.current").write_text("1000000000\n")
    (tmp_path / "memory.stat").write_text(
        "anon 600000000\nfile 400000000\ninactive_file 300000000\nactive_file 100000000\n"
    )
    assert host_memory(tmp_path) == (1 << 30, (1 << 30) - 600_000_000), "cached files are no memory that is gone"
    (tmp_path / "memory.max").write_text("max\n")
    assert host_memory(tmp_path)[0] > 1 << 30


@pytest.mark.parametrize(("free", "level"), [(1 << 20, "stop"), (5 << 30, "warn"), (1 << 40, "good")])
def test_little_disk(monkeypatch, free, level):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: types.SimpleNamespace(free=free))
    assert only(doctor.disk()).level == level


def test_embedded_tracking(monkeypatch, tmp_path):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MANTA_HOME", str(tmp_path))
    found = only(doctor.tracking())
    assert (found.level, str(tmp_path) in found.text) == ("good", True)


@pytest.mark.parametrize("uri", ["http://user:secret@127.0.0.1:{port}", "ftp://user:secret@host", "sqlite:///{file}"])
def test_tracking_that_does_not_answer(monkeypatch, tmp_path, uri):
    broken = tmp_path / "broken.db"
    broken.write_bytes(b"no database" * 100)
    with socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri.format(port=nobody.getsockname()[1], file=broken))
        found = only(doctor.tracking())
    assert (found.level, "MLFLOW_TRACKING_URI" in found.advice) == ("stop", True)
    assert "secret" not in found.text


def test_what_cannot_be_imported_is_a_finding(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    good, text = examined()
    assert not good
    assert "cannot be imported" in text


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, ["good", "good", "good"]),
        ({"ray": "2.9.0"}, ["good", "stop", "good"]),
        ({"python": "3.9.1"}, ["good", "good", "stop"]),
        ({"cpus": 0.0}, ["stop", "good", "good"]),
    ],
)
def test_cluster(monkeypatch, change, expected):
    stand_in = types.ModuleType("orchestrator.launch.cluster")
    stand_in.describe = lambda address: OFFERS | change  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, stand_in.__name__, stand_in)
    assert levels(doctor.cluster("auto")) == expected


def test_no_cluster_there(monkeypatch):
    def refuse(address: str) -> dict[str, object]:
        raise ClusterError(f"nothing listens at {address}")

    stand_in = types.ModuleType("orchestrator.launch.cluster")
    stand_in.describe = refuse  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, stand_in.__name__, stand_in)
    good, text = examined("10.0.0.1:6379")
    assert not good
    assert "nothing listens at 10.0.0.1:6379" in text
    assert "ray start --head" in text

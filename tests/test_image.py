"""The Dockerfile, as far as it can be judged without building it."""

import re
from dataclasses import dataclass, field
from fnmatch import fnmatch

import pytest

from tests.chart_kit import CHART, ROOT


@dataclass
class Stage:
    name: str
    base: str
    lines: list[tuple[str, str]] = field(default_factory=list)


def stages(text: str) -> dict[str, Stage]:
    """Stages by name, with their instructions; ARGs before the first are put in."""
    joined = re.sub(r"\\\n", " ", re.sub(r"^\s*#.*\n", "", text, flags=re.M))
    found: dict[str, Stage] = {}
    arguments: dict[str, str] = {}
    current = None
    for line in joined.splitlines():
        word, _, rest = line.strip().partition(" ")
        if word == "FROM":
            base, _, name = rest.partition(" AS ")
            base = re.sub(r"\$\{(\w+)\}", lambda m: arguments[m[1]], base)
            current = found[name] = Stage(name, base)
        elif current is None and word == "ARG":
            name, _, value = rest.partition("=")
            arguments[name] = value
        elif word and current is not None:
            current.lines.append((word, rest))
    return found


def chain(found: dict[str, Stage], name: str) -> list[Stage]:
    """A stage and what it is built on, the last first."""
    out = [found[name]]
    while out[-1].base in found:
        out.append(found[out[-1].base])
    return out


def mistakes(text: str) -> list[str]:
    found = stages(text)
    said = []
    for target in ("cpu", "cuda"):
        if target not in found:
            said.append(f"no stage {target}")
            continue
        line = chain(found, target)
        users = [rest for stage in line for word, rest in reversed(stage.lines) if word == "USER"]
        if not users or not re.fullmatch(r"[1-9]\d*(:\d+)?", users[0]):
            said.append(f"{target}: user {users[:1]}")
        pinned = r"[a-z0-9./-]+(:\d+\.\d+\.\d+[a-z0-9.-]*|@sha256:[0-9a-f]{64})"
        if not re.fullmatch(pinned, line[-1].base):
            said.append(f"{target}: {line[-1].base} is not pinned")
        if "." in line[-1].base.partition(":")[0]:
            said.append(f"{target}: names a registry's host")
    for stage in found.values():
        for word, rest in stage.lines:
            for step in re.split("&&|;", rest) if word == "RUN" else []:
                if "pip install" in step and "--constraint constraints.txt" not in step:
                    said.append(f"{stage.name}: pip without the pinned versions")
            if word in ("ENV", "ARG") and re.search(r"TOKEN|PASSWORD|SECRET|_KEY", rest):
                said.append(f"{stage.name}: a secret in {word}")
            if word == "ADD" or "://" in rest:
                said.append(f"{stage.name}: {word} fetches from a named place")
            if source := re.match(r"--from=(\S+)", rest):
                said += [] if source[1] in found else [f"{stage.name}: copies from {source[1]}, which is no stage"]
    return said


TEXT = (ROOT / "Dockerfile").read_text()


def test_dockerfile():
    assert mistakes(TEXT) == []


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("AS cuda\n", "AS gpu\n", "no stage cuda"),
        ("3.11.14-slim-bookworm", "latest", "cpu: python:latest is not pinned"),
        ("python:$", "host.example.com/python:$", "cpu: names a registry's host"),
        ("USER 1000:1000", "USER root", "cuda: user ['root']"),
        ("USER 1000:1000", "USER 0", "cuda: user ['0']"),
        ("pip install --constraint constraints.txt '.[eval,server]'", "pip install .", "packages: pip without"),
        ("ENV PYTHONUNBUFFERED=1", "ENV HF_TOKEN=x", "runtime: a secret in ENV"),
        ("COPY jobs jobs", "ADD https://x/y jobs", "runtime: ADD fetches"),
        ("--from=packages-cuda", "--from=build", "cuda: copies from build"),
    ],
)
def test_a_bad_dockerfile_is_seen(old, new, said):
    assert old in TEXT
    assert any(said in line for line in mistakes(TEXT.replace(old, new)))


def test_python_is_one_that_the_project_takes():
    version = re.search(r"ARG PYTHON=(\d+\.\d+)", TEXT)
    assert version
    assert version[1] == "3.11"


def test_what_is_copied_is_sent():
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert ignored[0] == "*"
    kept = {line[1:] for line in ignored if line.startswith("!")}
    copied = {
        name
        for stage in stages(TEXT).values()
        for word, rest in stage.lines
        if word == "COPY" and "--from" not in rest
        for name in rest.split()[:-1]
    }
    assert copied == kept
    assert all((ROOT / name).exists() for name in kept)
    assert not any(fnmatch(".git", pattern) or fnmatch(".venv", pattern) for pattern in kept)


def test_the_charts_user_is_the_images():
    assert "runAsUser: 1000\n" in (CHART / "values.yaml").read_text()
    assert "--uid 1000 " in TEXT


def test_tags_are_those_of_the_chart():
    version = re.search(r"appVersion: (\S+)", (CHART / "Chart.yaml").read_text())
    assert version
    for target in ("cpu", "cuda"):
        assert f"--target {target:<4} --tag manta:{version[1]}-{target}" in TEXT

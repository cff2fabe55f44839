"""The house rules: who may import whom, how long a file may be, what a knob says of itself. Each is shown to bite."""

import ast
import importlib
import pkgutil
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from pydantic import BaseModel, ConfigDict

import orchestrator.config
from orchestrator.config import Run
from orchestrator.config.load import load_run, load_search, load_serving
from orchestrator.config.strict import Strict
from orchestrator.errors import ConfigError

ROOT = Path(__file__).parents[1]
LONGEST = 400

LEAVES = (
    "cli",
    "cli_deltas",
    "cli_eval",
    "evaluate",
    "evaluate_set",
    "evaluate_show",
    "gate",
    "scores",
    "changes",
    "merge",
    "approximate",
    "preview",
    "preview_samples",
    "report",
    "plan",
    "plan_device",
    "plan_show",
    "cli_plan",
    "cli_tune",
    "leaderboard",
    "tell_search",
    "chat",
    "doctor",
    "quickstart",
    "__main__",
)
ORDER = ("errors", "config", "data", "base", "methods", "delta", "train", "registry", "serve", "search", "launch")
"""Rooms in the order in which data walks; the leaves come last and are one room."""

_LEAF_FILES = tuple(f"orchestrator/{leaf}.py" for leaf in LEAVES)
HOMES: dict[str, tuple[str, ...]] = {
    "pydantic": ("orchestrator/config/*",),
    "yaml": ("orchestrator/config/*",),
    "datasets": ("orchestrator/data/*",),
    "bitsandbytes": ("orchestrator/base/*",),
    "triton": ("orchestrator/base/*",),
    "transformers": (
        "orchestrator/base/*",
        "orchestrator/methods/*",
        "orchestrator/serve/cache*.py",
        "orchestrator/serve/engine*.py",
        "orchestrator/data/spans.py",  # renders chat templates by transformers' own function
        "jobs/*demo*.py",  # make the demo base, which is a transformers model
    ),
    "peft": ("orchestrator/methods/*", "orchestrator/merge.py"),
    "safetensors": ("orchestrator/base/*", "orchestrator/delta.py", "orchestrator/delta/*"),
    "deepspeed": ("orchestrator/train/engine.py",),
    "sklearn": ("orchestrator/train/metrics.py",),
    "optuna": ("orchestrator/search/*",),
    "plotly": ("orchestrator/search/*", "jobs/bench/*"),
    "sacrebleu": ("orchestrator/scores.py",),
    "rouge_score": ("orchestrator/scores.py",),
    "mlflow": ("orchestrator/registry.py", "orchestrator/registry/*"),
    "ray": ("orchestrator/launch/*",),
    "typer": ("orchestrator/cli*.py",),
    "click": ("orchestrator/cli*.py",),
    "starlette": ("orchestrator/serve/http.py",),
    "fastapi": ("orchestrator/serve/http.py",),
    "uvicorn": ("orchestrator/serve/http.py",),
    "rich": (*_LEAF_FILES, "orchestrator/launch/*"),
    "openai": ("orchestrator/chat.py", "orchestrator/quickstart.py"),
}
"""Each framework and the only files that may import it."""
TYPES_TOO: dict[str, tuple[str, ...]] = {"transformers": ("orchestrator/data/*",)}
"""Files that may name a framework's types, under ``if TYPE_CHECKING``."""
WITHOUT_TORCH = ("errors", "config")


# ---- the import map


def imports(tree: ast.AST, typing_only: bool = False) -> Iterator[tuple[str, int, bool]]:
    """Every import below a node, inside functions too: ``(module, line, under TYPE_CHECKING)``."""
    for node in ast.iter_child_nodes(tree):
        checking = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno, typing_only) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or ""), node.lineno, typing_only
            yield from ((f"{node.module}.{alias.name}", node.lineno, typing_only) for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            yield from ((str(a.value), node.lineno, typing_only) for a in node.args[:1] if isinstance(a, ast.Constant))
        yield from imports(node, typing_only or checking)


def room(module: str) -> int | None:
    """Place of a module in the order of rooms; None for the bare package and what is not ours."""
    parts = module.split(".")
    if parts[0] != "orchestrator" or len(parts) == 1:
        return None
    return ORDER.index(parts[1]) if parts[1] in ORDER else len(ORDER) if parts[1] in LEAVES else None


def broken(path: str, source: str) -> list[str]:
    """What the file at ``path``, relative to the root, imports although it may not."""
    said = []
    module = path.removesuffix(".py").replace("/", ".")
    parts = module.split(".")
    here = room(module)
    if parts[0] == "orchestrator" and len(parts) > 1 and parts[1] != "__init__" and here is None:
        said.append(f"{path}: {parts[1]} is no room; give it a place in ORDER or LEAVES")
    for name, line, typing_only in imports(ast.parse(source)):
        if name.startswith("."):
            said.append(f"{path}:{line}: relative import")
        there = room(name)
        if here is not None and there is not None and there > here:
            said.append(f"{path}:{line}: {name.split('.')[1]} comes later than this room")
        top = name.split(".")[0]
        homes = HOMES.get(top, ("*",)) + (TYPES_TOO.get(top, ()) if typing_only else ())
        if not any(fnmatch(path, home) for home in homes):
            said.append(f"{path}:{line}: {top} may be imported only in {', '.join(homes)}")
        if top == "torch" and here is not None and here <= ORDER.index("config"):
            said.append(f"{path}:{line}: torch in a room that reads files only")
    return sorted(set(said))


def files(*patterns: str) -> list[Path]:
    """Files of the project that match, without what tools leave behind."""
    out = {p for pattern in patterns for p in ROOT.glob(pattern) if p.is_file()}
    return sorted(
        p for p in out if not any(part[0] == "." or part == "__pycache__" for part in p.relative_to(ROOT).parts)
    )


SOURCES = files("orchestrator/**/*.py", "jobs/*.py")


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_import_map(path):
    assert broken(relative(path), path.read_text()) == []


def test_the_map_is_about_files_that_exist():
    assert len(SOURCES) > 20


@pytest.mark.parametrize(
    ("path", "source", "said"),
    [
        ("orchestrator/config/run.py", "import orchestrator.data.batch", "comes later"),
        ("orchestrator/config/run.py", "from orchestrator import data", "comes later"),
        ("orchestrator/data/pack.py", "from orchestrator.base import load_base", "comes later"),
        ("orchestrator/serve/engine.py", "def f():\n  import orchestrator.launch.serve", "comes later"),
        ("orchestrator/delta.py", "if TYPE_CHECKING:\n  from orchestrator.train.loop import Loop", "comes later"),
        ("orchestrator/launch/train.py", "from orchestrator.cli import main", "comes later"),
        ("orchestrator/data/pack.py", "from . import batch", "relative import"),
        ("orchestrator/data/pack.py", "from .batch import Batch", "relative import"),
        ("orchestrator/config/home.py", "import torch.nn", "torch in a room"),
        ("orchestrator/errors.py", "import torch", "torch in a room"),
        ("orchestrator/train/loop.py", "def f():\n  import deepspeed", "deepspeed may be imported only"),
        ("orchestrator/train/loop.py", "import importlib\nimportlib.import_module('ray.train')", "ray may be"),
        ("orchestrator/doctor.py", "try:\n  import ray\nexcept ImportError:\n  pass", "ray may be imported only"),
        ("orchestrator/data/pack.py", "from transformers import PreTrainedTokenizer", "transformers may be"),
        ("orchestrator/train/worker.py", "from mlflow.tracking import MlflowClient", "mlflow may be"),
        ("orchestrator/serve/app.py", "import starlette.responses", "starlette may be"),
        ("orchestrator/serve/http.py", "import pydantic", "pydantic may be"),
        ("orchestrator/train/metrics.py", "import sacrebleu", "sacrebleu may be"),
        ("orchestrator/train/loop.py", "from rich.progress import Progress", "rich may be"),
        ("jobs/train.py", "import ray", "ray may be"),
        ("orchestrator/utils.py", "x = 1", "utils is no room"),
    ],
)
def test_import_map_bites(path, source, said):
    (line,) = broken(path, source)
    assert said in line


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("orchestrator/data/pack.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n  import transformers"),
        ("orchestrator/train/engine.py", "import deepspeed, torch\nfrom orchestrator import __version__"),
        ("orchestrator/doctor.py", "def f():\n  from orchestrator.launch.cluster import describe"),
        ("orchestrator/cli.py", "import typer\nfrom orchestrator.chat import chat"),
        ("jobs/train.py", "from orchestrator.cli import main"),
    ],
)
def test_import_map_allows(path, source):
    assert broken(path, source) == []


# ---- sizes, words


def too_long(text: str) -> bool:
    return len(text.splitlines()) > LONGEST


def test_no_file_is_too_long():
    assert [relative(p) for p in files("*/**/*.py") if too_long(p.read_text())] == []
    assert too_long("x\n" * (LONGEST + 1))
    assert not too_long("x\n" * LONGEST)


STRANGE = re.compile(
    r"/(?:home|root|Users|work)/\w"  # somebody's machine
    r"|pypi\.(?:org|python)|pythonhosted\.(?:org)|download\.(?:pytorch)"  # a setting of the machine
    r"|DESIGN[.]md"  # the project explains itself
)


def test_no_file_speaks_of_a_machine_or_a_package_host():
    places = ("*", "orchestrator/**/*.py", "jobs/**/*", "tests/**/*.py", "helm/**/*", "clusters/**/*")
    texts = [*files(*places), ROOT / ".ci/run", ROOT / ".gitignore", ROOT / ".dockerignore"]
    named = [
        f"{relative(path)}:{number}"
        for path in texts
        if path.suffix in (".py", ".md", ".toml", ".txt", ".yaml", ".sh", ".tpl", "")
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if STRANGE.search(line)
    ]
    assert named == []


@pytest.mark.parametrize("text", ["/home/" + "me/x", "cd /ro" + "ot/x", "https://pypi" + ".org/simple"])
def test_strange_words_are_seen(text):
    assert STRANGE.search(text)


# ---- config


def models() -> list[type[BaseModel]]:
    """Every record in ``config/``."""
    for module in pkgutil.iter_modules(orchestrator.config.__path__):
        importlib.import_module(f"orchestrator.config.{module.name}")
    found: list[type[BaseModel]] = []
    more: list[type[BaseModel]] = [Strict]
    while more:
        subclasses = more.pop().__subclasses__()
        found += (mine := [c for c in subclasses if c.__module__.startswith("orchestrator.config.")])
        more += mine
    return found


def undocumented(model: type[BaseModel]) -> list[str]:
    return [f"{model.__name__}.{name}" for name, field in model.model_fields.items() if not field.description]


def test_every_knob_has_a_docstring():
    assert Run in models()
    assert [knob for model in models() for knob in undocumented(model)] == []


def test_a_knob_without_a_docstring_is_seen():
    class Bad(BaseModel):
        model_config = ConfigDict(use_attribute_docstrings=True)
        said: int = 1
        """Said."""
        silent: int = 2

    assert undocumented(Bad) == ["Bad.silent"]


def shipped_mistakes(path: Path) -> list[str]:
    """What is wrong with a shipped run, apart from data that lies on the user's machine."""
    keys = yaml.safe_load(path.read_text()) or {}
    load = load_search if "methods" in keys else load_run if set(keys) <= {*Run.model_fields, "shard"} else load_serving
    try:
        load(path)
    except ConfigError as error:
        return [line for line in str(error).splitlines()[1:] if "does not exist" not in line]
    return []


@pytest.mark.parametrize("path", files("jobs/runs/**/*.y*ml"), ids=relative)
def test_shipped_runs_parse(path):
    assert shipped_mistakes(path) == []


def test_a_bad_shipped_run_is_seen(tmp_path):
    bad = tmp_path / "bad.yaml"
    bad.write_text("data: missing.jsonl\nmethod: {rank: 0}\n")
    (line,) = shipped_mistakes(bad)
    assert "method.rank" in line
    bad.write_text("prot: 8000\n")
    assert shipped_mistakes(bad)
    bad.write_text("methods: [{type: lora, rank: {choice: [0]}}]\n")
    (line,) = shipped_mistakes(bad)
    assert "methods.0.rank" in line


def loaded_by(code: str) -> set[str]:
    """Top-level modules in a fresh process after ``code``."""
    code += "\nimport sys; print(*{m.split('.')[0] for m in sys.modules})"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


def test_config_is_light():
    assert not loaded_by("import orchestrator.config, orchestrator.config.load") & {"torch", "ray", "transformers"}
    assert "torch" in loaded_by("import torch")


# ---- set-up


def unpinned(requirements: list[str], constraints: str) -> list[str]:
    """Requirements that the constraints do not pin to one version in their range."""
    pins = {canonicalize_name(n): v for n, _, v in (line.partition("==") for line in constraints.splitlines()) if v}
    wanted = [Requirement(r) for r in requirements]
    return [str(r) for r in wanted if (pin := pins.get(canonicalize_name(r.name))) is None or pin not in r.specifier]


def test_tested_versions_are_pinned_within_the_ranges():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    constraints = (ROOT / "constraints.txt").read_text()
    assert unpinned(project["dependencies"] + project["optional-dependencies"]["dev"], constraints) == []
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", line) for line in constraints.splitlines())


def test_a_missing_pin_is_seen():
    assert unpinned(["a>=2", "b>=1", "c"], "a==1.9\nb==1.0\n") == ["a>=2", "c"]

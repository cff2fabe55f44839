"""A new method is its file, its knobs and one line of a dict: a copy of the tree gets one, and does all with it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
KNOBS = '''class Gain(Knobs):
    """A factor on each output of a layer."""

    default_lr: ClassVar[float] = 1e-2
    type: Literal["gain"] = "gain"
    """Method name."""
    targets: tuple[str, ...] = ("all-linear",)
    """Layers."""


'''
IMPORT = "from orchestrator.methods.gain import GainMethod\n"
METHOD = '''"""A factor on each output of a layer: ``y = (1 + g) o W x``; ``g`` [O] starts at zero."""

import torch

from orchestrator.config.method import Gain
from orchestrator.methods.method import Method
from orchestrator.methods.targets import match


class GainMethod(Method):
    """See the module."""

    name = "gain"
    knobs = Gain
    uses_base_output = True

    def sites(self, knobs, scope):
        return dict.fromkeys(match(knobs.targets, scope.linears), "output")

    def shapes(self, knobs, site, scope):
        return {"gain": scope.linears[site][:1]}

    def start(self, knobs, site, scope, generator):
        return {"gain": torch.zeros(scope.linears[site][0])}

    def output(self, x_GMI, y_GMO, p):
        bias = getattr(p.module, "bias", None)
        return p.cast("gain", x_GMI).unsqueeze(1) * (y_GMO if bias is None else y_GMO - bias)

    def weight_change(self, knobs, site, tensors, base):
        return {"weight": tensors["gain"].unsqueeze(1) * base["weight"]}
'''


def replaced(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert text.count(old) == 1, (path, old)
    path.write_text(text.replace(old, new))


def test_a_method_is_one_file_its_knobs_and_one_line(tmp_path: Path) -> None:
    package = tmp_path / "orchestrator"
    shutil.copytree(ROOT / "orchestrator", package, ignore=shutil.ignore_patterns("__pycache__"))
    (package / "methods" / "gain.py").write_text(METHOD)
    table = package / "methods" / "table.py"
    replaced(table, "from orchestrator.methods.head", f"{IMPORT}from orchestrator.methods.head")
    replaced(table, "METHODS: dict[str, Method] = {\n", 'METHODS: dict[str, Method] = {\n    "gain": GainMethod(),\n')
    replaced(package / "config" / "method.py", "class Lora(Knobs):\n", f"{KNOBS}class Lora(Knobs):\n")
    replaced(package / "config" / "method.py", "    Lora | Full |", "    Gain | Lora | Full |")
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", "MANTA_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-W", "ignore", "-m", "tests.toy_script", str(tmp_path)]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=500, check=False)
    assert done.stdout.strip().endswith("all of it"), done.stderr[-4000:]

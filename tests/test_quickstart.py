"""The first thing a newcomer types, whole: two real sharded workers, MLflow, and an endpoint over HTTP."""

import os
import re
import subprocess
import sys
from pathlib import Path

from orchestrator.config.load import load_run
from orchestrator.quickstart import quickstart_run


def test_the_shipped_file_is_the_quickstart() -> None:
    assert load_run(Path("jobs/runs/quickstart.yaml")) == quickstart_run()


def test_quickstart_teaches_and_serves(tmp_path: Path) -> None:
    env = {**os.environ, "MANTA_HOME": str(tmp_path), "COLUMNS": "200"}
    done = subprocess.run(
        [str(Path(sys.executable).with_name("manta")), "quickstart", "--no-keep"],
        env=env,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    figures = re.search(r"base (\d+)%, quickstart:1 (\d+)%", done.stdout)
    assert figures, done.stdout
    assert int(figures[1]) < 10
    assert int(figures[2]) >= 90
    assert "sharded over them (ZeRO-3)" in done.stderr
    assert f"sqlite:///{tmp_path}/mlflow.db" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
    keep_commands(env, tmp_path)


def keep_commands(env: dict[str, str], folder: Path) -> None:
    """The README's commands on what the quickstart left."""

    def manta(*words: str) -> str:
        command = [str(Path(sys.executable).with_name("manta")), *words]
        done = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    manta("deltas", "promote", "quickstart:1")
    assert "champion" in manta("deltas", "show", "quickstart")
    manta("deltas", "export", "quickstart", "--peft", "./plain")
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {p.name for p in (folder / "plain").iterdir()}
    manta("deltas", "export", "quickstart", "--merged", "./dense", "--base", "demo")
    assert (folder / "dense" / "config.json").is_file()
    manta("deltas", "import", "./plain", "--name", "imported", "--base", "demo")
    listed = manta("deltas", "list")
    assert "quickstart" in listed
    assert "imported" in listed
    manta("deltas", "gc")

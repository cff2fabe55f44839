"""Every command in the README: settings parse, options exist, paths are there."""

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from orchestrator.cli import app, split
from orchestrator.config.load import load_run, load_search, load_serving

README = Path("README.md").read_text()
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, re.S)
COMMANDS = [
    shlex.split(line, comments=True)
    for kind, block in BLOCKS
    if kind == "console"
    for line in block.splitlines()
    if line.strip() and not line.startswith("#")
]
LOADS = {"train": load_run, "serve": load_serving, "tune": load_search}


def words(command: list[str]) -> tuple[list[str], list[str]]:
    """Settings and files, and options, of a ``manta train`` or ``manta serve``."""
    rest, options = [], []
    skip = False
    for word in command[2:]:
        if word.startswith("--"):
            options.append(word)
            skip = word in ("--resume", "--address")
        elif not skip:
            rest.append(word)
        else:
            skip = False
    return rest, options


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_command_of_the_readme_is_one(command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if command[0] == "make":
        assert re.search(rf"^{command[1]}:", Path("Makefile").read_text(), re.M)
    elif command[0] in ("helm", "docker") or command[:2] == ["ray", "up"]:
        paths = [word.rpartition("=")[2] for word in command if "/" in word or word == "."]
        assert paths
        assert all(Path(path).exists() for path in paths)
    elif command[0] == "ray":
        at = command.index("python")
        assert Path(command[at + 1]).is_file()
        LOADS[Path(command[at + 1]).stem](*split(command[at + 2 :]))
    elif command[0] == "manta" and command[1] in LOADS:
        rest, options = words(command)
        Path(tmp_path, "my.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
        rest = [w.replace("data=my.jsonl", f"data={tmp_path}/my.jsonl") for w in rest]
        LOADS[command[1]](*split(rest))
        shown = CliRunner().invoke(app, [command[1], "--help"], env={"COLUMNS": "200"}).output
        assert all(option in shown for option in options)
    elif command[0] == "manta":
        deep = [w for w in command[1:3] if w.isalpha()] if command[1] == "deltas" else command[1:2]
        result = CliRunner().invoke(app, [*deep, "--help"], env={"COLUMNS": "200"})
        assert result.exit_code == 0
        assert all(w in result.output for w in command if w.startswith("--"))
    else:
        assert command[0] in ("mlflow", "source")


def test_the_run_file_of_the_readme_reads(tmp_path: Path) -> None:
    text = next(block for kind, block in BLOCKS if kind == "yaml")
    for name in ("tickets.jsonl", "manuals"):
        assert name in text
    Path(tmp_path, "tickets.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    Path(tmp_path, "manuals").mkdir()
    Path(tmp_path, "manuals", "a.parquet").write_bytes(b"")
    text = text.replace("tickets.jsonl", f"{tmp_path}/tickets.jsonl").replace("manuals/", f"{tmp_path}/manuals/")
    file = tmp_path / "run.yaml"
    file.write_text(text)
    run = load_run(file)
    assert (run.cluster.workers.max, run.method.rank, run.train.early_stopping) == (8, 16, 3)


def test_the_search_file_of_the_readme_reads(tmp_path: Path) -> None:
    text = next(block for kind, block in BLOCKS if kind == "yaml" and "methods:" in block)
    Path(tmp_path, "tickets.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    file = tmp_path / "search.yaml"
    file.write_text(text.replace("tickets.jsonl", f"{tmp_path}/tickets.jsonl"))
    search = load_search(file)
    assert [entry["type"] for entry in search.methods] == ["lora", "lora", "bottleneck"]
    assert (search.budget.trials, len(search.objective)) == (40, 2)


def test_figures_of_the_readme_are_those_of_the_benchmarks() -> None:
    measured = Path("jobs/bench/gpu.md").read_text().replace("Manta, replicated (shard: 0)", "Manta")
    rows = [line for line in README.splitlines() if re.match(r"\| [14] x \d+[^|]*\| (peft|Manta)", line)]
    assert len(rows) == 9
    assert all(f"|{row.split('|', 2)[2]}" in measured for row in rows)


def test_methods_in_the_readme_are_the_benchmarks() -> None:
    measured = [[c.strip() for c in line.split("|")] for line in Path("jobs/bench/methods.md").read_text().splitlines()]
    kept = {tuple(c[1:12]) for c in measured if len(c) > 11}
    rows = [
        [c.strip() for c in line.strip("|").split("|")] for line in README.splitlines() if re.search(r" [kM]B \|", line)
    ]
    assert len(rows) > 10
    assert {tuple(row) for row in rows} <= kept


def test_memory_in_the_readme_is_the_benchmarks() -> None:
    """Without its columns of limits and of DeepSpeed's start, and without the last one's re-entrant kind."""
    measured = Path("jobs/bench/zero_memory.md").read_text()
    assert "within its limit: yes" in measured
    cells = [[c.split(";")[0].strip() for c in row.split("|")] for row in measured.splitlines()]
    kept = {" | ".join(c[n] for n in (1, 2, 3, 5, 9, 10)) for c in cells if len(c) > 11}
    rows = [line.strip("| ") for line in README.splitlines() if re.match(r"\| [24] \| ", line)]
    assert len(rows) == 4
    assert set(rows) <= kept


def test_paths_named_in_the_readme_exist() -> None:
    named = set(re.findall(r"`((?:jobs|orchestrator|tests)/[\w./-]+)`", README))
    assert named
    assert all(Path(path).exists() for path in named), named

"""A search's report: one file, all in it, whatever its trials are called and failed of."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from orchestrator.config import Run
from orchestrator.config.load import load_run
from orchestrator.search import figures
from orchestrator.search.frozen import frozen_study, importances
from orchestrator.search.report import run_file, write_report
from orchestrator.search.study import Study
from tests.study_kit import HOSTILE, study

PLOTS = ("plot-curves", "plot-pareto-parameters", "plot-parallel", "plot-importance", "plot-timeline")


class Page(HTMLParser):
    """What a browser would make of the file: elements that load something, the table's rows, element ids."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.loads: list[tuple[str, str, str | None]] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.rows: list[list[str]] = []
        self.handlers: list[str] = []
        self._open: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self._open.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "srcset", "data", "action", "poster"):
                self.loads.append((tag, name, value))
            if name.startswith("on"):
                self.handlers.append(name)
            if name == "id" and value:
                self.ids.append(value)
        if tag == "tr":
            self.rows.append([])
        if tag == "td":
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if "td" in self._open:
            self.rows[-1][-1] += data

    @property
    def trials(self) -> list[list[str]]:
        return [row for row in self.rows if row]


def written(path: Path, made: Study) -> Page:
    return Page(write_report(made, path / "report.html"))


def test_a_report_holds_every_trial_and_loads_nothing(tmp_path: Path) -> None:
    page = written(tmp_path, study(12))
    assert page.loads == []
    assert "default-src 'none'" in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert sorted(int(row[1]) for row in page.trials) == list(range(12))
    assert {row[2] for row in page.trials} == {"finished", "stopped", "failed"}
    ranked = [row for row in page.trials if row[0]]
    losses = [float(row[4]) for row in ranked]
    assert losses == sorted(losses)
    assert all(row[2] == "failed" for row in page.trials if not row[0])
    assert any("the loss was not finite" in row[-1] for row in page.trials)
    assert set(PLOTS) - {"plot-importance"} <= set(page.ids)


def test_hostile_names_and_reasons_stay_text(tmp_path: Path) -> None:
    made = study(12)
    made.search = made.search.model_copy(update={"base": made.search.base.model_copy(update={"id": HOSTILE})})
    made.rows["t00001"].params[HOSTILE] = HOSTILE
    made.over = HOSTILE
    page = written(tmp_path, made)
    assert page.loads == []
    assert page.handlers == []
    assert "img" not in page.tags
    calm = written(tmp_path, study(12, hostile=None))
    assert page.tags.count("script") == calm.tags.count("script")
    (row,) = (row for row in page.trials if row[1] == "5")
    assert HOSTILE in row[-1]


def test_credentials_stay_out(tmp_path: Path) -> None:
    made = study(12, hostile=None)
    made.rows["t00000"].reason = "cannot reach https://me:hunter2@example.test/x"
    row = made.winner()
    assert row is not None
    row.run["tracking"]["uri"] = "postgresql://me:hunter2@example.test/mlflow"
    written(tmp_path, made)
    assert "hunter2" not in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_the_same_study_gives_the_same_bytes(tmp_path: Path) -> None:
    first = write_report(study(24), tmp_path / "one.html").read_bytes()
    assert first == write_report(study(24), tmp_path / "two.html").read_bytes()


@pytest.mark.parametrize(
    "given",
    [
        {"name": "orders", "method": "bitfit", "train": {"lr": 1e-05, "steps": 40}},
        {"method": {"type": "lora", "rank": 4, "targets": ["q_proj"]}, "data": {"eval_fraction": 0.1}},
        {"task": {"type": "classification"}, "data": {"train": ["so: odd # a name.jsonl"]}, "method": {"type": "ia3"}},
        {},
    ],
)
def test_the_winners_run_can_be_pasted(given: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("so: odd # a name.jsonl").write_text('{"text": "a", "label": "b"}\n')
    run = Run.model_validate(given)
    path = tmp_path / "winner.yaml"
    path.write_text(run_file(json.loads(run.model_dump_json())))
    assert load_run(path) == run


def test_studies_of_every_age_have_a_report(tmp_path: Path) -> None:
    new = study(0)
    page = written(tmp_path, new)
    assert page.trials == []
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "there is no winner" in text
    failed = study(1, hostile=0)
    assert len(written(tmp_path, failed).trials) == 1
    young = study(8)
    assert "plot-importance" not in written(tmp_path, young).ids
    assert "too few to tell" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_objectives_that_no_trial_has_do_not_break_it(tmp_path: Path) -> None:
    made = study(12, objective=("accuracy", "parameters", "latency"))
    page = written(tmp_path, made)
    assert {"plot-pareto-parameters", "plot-pareto-latency"} <= set(page.ids)
    best = [float(row[4]) for row in page.trials if row[0]]
    assert best == sorted(best, reverse=True)
    written(tmp_path, study(12, objective=("f1",)))


def test_the_front_is_what_no_trial_beats() -> None:
    made = study(24, objective=("accuracy", "parameters"))
    rows = [row for row in made.rows.values() if row.state != "failed"]
    assert {r.number for r in figures.front(rows, "accuracy", "parameters")} == {r.number for r in made.front()}


def test_importance_finds_the_knob_that_matters() -> None:
    made = study(24, hostile=None)
    for n, row in enumerate(made.rows.values()):
        row.state, row.params = "finished", {"method": "lora", "matters": float(n % 12), "does not": (n * 7) % 5 + 0.5}
        row.metrics = {"eval_loss": abs(row.params["matters"] - 3.0)}
    found = importances(frozen_study(made))
    assert next(iter(found)) == "matters"
    assert found["matters"] > 3 * found["does not"]
    assert "method" not in found


def test_a_lost_packs_trial_is_in_the_timeline_twice() -> None:
    made = study(4, hostile=None)
    row = made.rows["t00001"]
    made.hear("t00001", "joined", {"step": 10, "total": 40, "pack": "pack-1"}, row.spans[0].end + 5)
    made.hear("t00001", "ended", {"why": "finished"}, row.spans[0].end + 9)
    lines = [line for bar in figures.timeline(made).data for line in bar.y]
    assert len(lines) == 5
    assert sum(line.startswith("pack-1") for line in lines) == 1


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PROBE = """
<script>window.problems = []; window.addEventListener("error", (e) => problems.push(e.message));
document.addEventListener("securitypolicyviolation", (e) => problems.push(e.blockedURI));</script>"""
ANSWER = """
<script>window.addEventListener("load", () => setTimeout(() => {
  document.querySelectorAll("th")[1].click();
  const said = {problems, title: document.title, plots: {}, order: []};
  for (const plot of document.querySelectorAll(".js-plotly-plot"))
    said.plots[plot.id] = plot.querySelectorAll("path.js-line, .point, .bars path").length;
  for (const row of document.querySelectorAll("#leaderboard tbody tr")) said.order.push(row.cells[1].textContent);
  document.documentElement.dataset.said = JSON.stringify(said);
}, 500));</script>"""


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_a_browser_draws_every_plot(tmp_path: Path) -> None:
    path = write_report(study(24), tmp_path / "report.html")
    text = path.read_text(encoding="utf-8")
    assert "<title>" in text
    path.write_text(text.replace("<title>", f"{PROBE}<title>", 1).replace("</body>", f"{ANSWER}</body>"))
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile"]
    command += ["--window-size=1440,3700", "--virtual-time-budget=10000", "--dump-dom", f"file://{path}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = re.search(r'data-said="([^"]*)"', done.stdout)
    assert found, done.stderr[-2000:]
    said = json.loads(found[1].replace("&quot;", '"').replace("&amp;", "&"))
    assert said["problems"] == []
    assert said["title"] == "orders · search"
    assert set(said["plots"]) == set(PLOTS)
    assert all(said["plots"].values()), said["plots"]
    assert said["order"] == [str(n) for n in range(24)]

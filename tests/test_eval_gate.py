"""``manta eval`` on a real store: what it keeps, and promotions that have to be earned."""

import json
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient
from typer.testing import CliRunner

from orchestrator.cli import app, main
from orchestrator.config import Tracking
from orchestrator.errors import MantaError, NotBetterError, RegistryError
from orchestrator.gate import promote_if_better
from orchestrator.registry import CHAMPION, Evaluation, Registry
from tests.eval_kit import Made, write
from tests.launch_kit import small, train_here


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MANTA_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("made"))


# ---- promotions, on a real store


def kept(ref: str, **metrics: float) -> Evaluation:
    held = {"base": "tiny", "source_hash": "a" * 64, "recipe": "none/fp32", "data": "dev.jsonl"}
    return Evaluation(ref, "b" * 64, **held, digest="c" * 64, records=9, settings={"length": 64}, metrics=metrics)


def test_a_candidate_becomes_champion_only_if_it_is_better(made: Made, tmp_path: Path) -> None:
    registry = Registry(Tracking())
    file = write(tmp_path / "predictions.jsonl", [])
    one = registry.publish(made.talker, name="talker")
    assert (
        promote_if_better(registry, one.ref, "bleu").why
        == "talker:1 is champion: there was no champion to compare it with"
    )
    assert promote_if_better(registry, one.ref, "bleu").why == "talker:1 is champion already"
    two = registry.publish(made.sorter, name="talker", alias="candidate")
    with pytest.raises(RegistryError, match="talker:2 has no evaluation with bleu; run: manta eval talker:2"):
        promote_if_better(registry, "talker@candidate", "bleu")
    registry.log_evaluation(kept("talker:2", bleu=30.0, loss=2.0), two, file)
    with pytest.raises(RegistryError, match="talker:1 has no evaluation with bleu that can be compared"):
        promote_if_better(registry, "talker@candidate", "bleu")
    registry.log_evaluation(kept("talker:1", bleu=30.0, loss=2.5), one, file)
    said = r"bleu on dev.jsonl \(9 records\) is 30, that of talker:1 \(champion\) is 30, and higher is better"
    with pytest.raises(NotBetterError, match=said):
        promote_if_better(registry, "talker@candidate", "bleu")
    assert registry.resolve("talker@champion").version == 1
    done = promote_if_better(registry, "talker@candidate", "loss", by="ann")
    assert "loss on dev.jsonl (9 records) is 2, that of talker:1 was 2.5" in done.why
    champion = registry.resolve("talker@champion")
    assert (champion.version, champion.moves[CHAMPION]["by"], champion.moves[CHAMPION]["from"]) == (2, "ann", 1)
    assert champion.tags["manta.eval.dev.loss"] == "2"


def test_figures_of_other_records_are_not_compared(made: Made, tmp_path: Path) -> None:
    registry = Registry(Tracking())
    file = write(tmp_path / "predictions.jsonl", [])
    one = registry.publish(made.talker, name="talker", alias="champion")
    two = registry.publish(made.sorter, name="talker")
    registry.log_evaluation(kept("talker:1", loss=2.0), one, file)
    for other in ({"digest": "d" * 64}, {"recipe": "nf4-double/fp32"}, {"settings": {"length": 128}}):
        registry.log_evaluation(Evaluation(**{**vars(kept("talker:2", loss=1.0)), **other}), two, file)
    with pytest.raises(RegistryError, match="talker:1 has no evaluation with loss that can be compared"):
        promote_if_better(registry, "talker:2", "loss")


# ---- the command


def test_the_command_keeps_everything_and_promotes(
    made: Made, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    registry = Registry(Tracking())
    registry.publish(made.talker, name="talker", alias="champion")
    worse = tmp_path / "worse"
    train_here(
        small(f"base={made.base}", "base.quantize=none", f"data={made.texts}", "train.steps=8", "train.lr=0.05"), worse
    )
    (folder,) = worse.glob("step-*8/delta/delta")
    registry.publish(folder, name="talker", alias="candidate")
    out = tmp_path / "said" / "out.jsonl"
    words = ["eval", "talker@candidate", "--data", str(made.asked), "--metric", "exact_match", "--max-tokens", "3"]
    with pytest.raises(SystemExit) as ended:
        main(["eval", "talker@candidate", "--data", str(made.asked), "--promote", "accuracy"])
    assert ended.value.code == 2
    assert "'accuracy' does not fit the task causal_lm" in capfd.readouterr().err
    with pytest.raises(SystemExit) as ended:
        main([*words, "--output", str(out), "--json", "--promote", "loss"])
    heard = capfd.readouterr()
    told = json.loads(heard.out)
    assert ended.value.code == NotBetterError.exit_code
    assert "talker:2 is not promoted: its loss on" in heard.err
    assert "lower is better" in heard.err
    assert Registry(Tracking()).resolve("talker@champion").version == 1
    assert told["metrics"].keys() == {"exact_match", "loss"}
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["record"] for line in lines] == [f"{made.asked}:{n}" for n in (1, 2, 3)]
    assert list(out.parent.iterdir()) == [out]

    one, two = (registry.resolve(f"talker:{n}") for n in (1, 2))
    (mine,), (other,) = one.evaluations.values(), two.evaluations.values()
    assert mine["metrics"]["loss"] < other["metrics"]["loss"]
    assert mine["digest"] == other["digest"] == told["digest"]
    client = MlflowClient(registry.uri, registry.uri)
    kept_run = client.get_run(other["run"])
    assert kept_run.info.status == "FINISHED"
    assert kept_run.data.tags["manta.eval"] == "asked"
    assert kept_run.data.metrics == told["metrics"]
    assert kept_run.data.params["sha256"] == two.sha256
    assert kept_run.data.params["recipe"] == "none/fp32"
    assert [a.path for a in client.list_artifacts(other["run"])] == ["out.jsonl"]
    shown = CliRunner().invoke(app, ["deltas", "show", "talker:2"], env={"COLUMNS": "200"}).output
    assert "eval.asked.loss" in shown

    refused = CliRunner().invoke(app, ["deltas", "promote", "talker:2", "--if-better", "loss"])
    assert isinstance(refused.exception, NotBetterError)
    registry.promote("talker:2")
    done = CliRunner().invoke(app, ["deltas", "promote", "talker:1", "--if-better", "loss"])
    assert done.exit_code == 0, done.output
    assert registry.resolve("talker@champion").version == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["base", "--promote", "loss"], "--promote needs a registered delta"),
        (["base", "--metric", "blue"], "no metric 'blue'; did you mean 'bleu'"),
        (["base", "quantize"], "is no setting"),
        (["base", "base.quantise=nf4"], "quantize"),
        (["base", "--output", "."], "is a directory"),
        (["nobody"], "no delta 'nobody'"),
    ],
)
def test_a_wrong_command_is_told(words: list[str], said: str, made: Made) -> None:
    result = CliRunner().invoke(app, ["eval", *words, "--data", str(made.asked)])
    assert isinstance(result.exception, MantaError)
    assert said in str(result.exception)

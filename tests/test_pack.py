"""Packs: each trial's losses are those of its solo run, whoever is beside it and whatever becomes of them."""

import json
from pathlib import Path

import pytest
import torch

from orchestrator.data.demo import demo_records
from orchestrator.train.pack import Limits
from tests import tiny
from tests.classify_kit import CLASSIFY, write
from tests.launch_kit import train_here, weights
from tests.pack_kit import Played, assert_same, pack_here, trial


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("data") / "held.jsonl"
    path.write_text("\n".join(map(json.dumps, demo_records("test", 6))))
    return f"data.eval={path}"


SOME = {
    "lora": ("train.steps=6", "train.eval_every=2", "method.rank=4", "method.dropout=0.2"),
    "dora": (
        *("train.steps=4", "train.eval_every=2", "method.rank=8", "method.dora=true", "train.batch_size=2"),
        *("data.length=96", "train.schedule=linear", "train.seed=3"),
    ),
    "prompt": (
        *("train.steps=5", "train.eval_every=2", "method={type: prompt, tokens: 5}", "train.lr=0.1"),
        *("train.rows_per_pass=1", "train.batch_size=6"),
    ),
    "head": (
        *("train.steps=3", "train.eval_every=1", "method={type: last_layers, layers: 1, head: true}"),
        *("train.lr=0.002", "data.packing=false", "train.clip=0.1"),
    ),
    "sparse": (
        *("train.steps=6", "train.eval_every=3", "method={type: sparse, density: 0.02, rechoose_every: 2}"),
        *("train.weight_decay=0.1", "train.seed=1"),
    ),
}
"""Unlike each other in all that a trial may choose."""


def test_each_trial_trains_as_it_would_alone(base: Path, held_out: str, tmp_path: Path) -> None:
    runs = {name: trial(base, held_out, *overrides) for name, overrides in SOME.items()}
    desk = pack_here(Played(tmp_path / "pack", runs, at={"dora": 1, "sparse": 3}, until={"prompt": 3}), trial(base))
    assert desk.ended("prompt")["why"] == "withdrawn"
    assert desk.ended("prompt")["step"] == 3
    for name, run in runs.items():
        told = train_here(run, tmp_path / "solo" / name)
        assert_same(desk, name, told, steps=3 if name == "prompt" else None)
        if name == "prompt":
            continue
        assert desk.ended(name)["why"] == "finished"
        kept, latest = desk.latest(name), told.latest
        assert kept is not None
        assert latest is not None
        for part in ("delta", "best"):
            for key, value in weights(latest / "delta" / part).items():
                torch.testing.assert_close(weights(kept / "delta" / part)[key], value, rtol=1e-3, atol=2e-5)
    (joined,) = [values for t, kind, values in desk.heard if (t, kind) == ("lora", "joined")]
    sites = 2 * (64 + 64 + 2 * (64 + 32) + 64 + 64 + 3 * (64 + 128))  # of each of two layers: q, k, v, o and three more
    assert joined["parameters"] == 4 * sites
    assert joined["memory"] == 4 * joined["parameters"] * 4
    assert joined["latency"] >= 0


def test_trials_stop_early_each_by_itself(tmp_path: Path) -> None:
    base, texts = tiny.save(tmp_path / "base", "bert"), write(tmp_path / "texts.jsonl")
    common = (f"data.train={texts}", f"data.eval={texts}", *CLASSIFY, "train.eval_every=1", "train.early_stopping=2")
    runs = {
        "stuck": trial(base, *common, "train.steps=9", "train.metric=accuracy", "train.lr=1e-7"),
        "going": trial(base, *common, "train.steps=6", "train.lr=0.003"),
    }
    desk = pack_here(Played(tmp_path / "pack", runs), trial(base, *common))
    for name, run in runs.items():
        told = train_here(run, tmp_path / "solo" / name)
        assert desk.ended(name)["why"] == told.why  # type: ignore[attr-defined]
        assert_same(desk, name, told)
        assert desk.of(name, "eval", "best_step") == told.of("eval", "best_step")
    assert desk.ended("stuck")["why"] == "stopped early"
    assert desk.ended("stuck")["step"] == 3
    assert desk.ended("going")["why"] == "finished"


@pytest.mark.parametrize("name", ["lora", "sparse"])
def test_a_trial_goes_on_from_its_checkpoint_in_another_pack_and_alone(
    name: str, base: Path, held_out: str, tmp_path: Path
) -> None:
    runs = {n: trial(base, held_out, *SOME[n], "train.checkpoint_every=1") for n in (name, "dora", "prompt")}
    undisturbed = train_here(runs[name], tmp_path / "solo")
    first = pack_here(Played(tmp_path / "pack", {n: runs[n] for n in (name, "prompt")}, until={name: 2}), trial(base))
    assert first.ended(name)["step"] == 2
    second = pack_here(
        Played(tmp_path / "pack", {n: runs[n] for n in ("dora", name)}, at={name: 2}, until={name: 4}), trial(base)
    )
    assert second.of(name, "joined", "step") == [2]
    assert_same(second, name, undisturbed, first=2, steps=4)
    third = train_here(runs[name], tmp_path / "pack" / name)  # what a pack left, by the solo path
    want = undisturbed.of("step", "loss")[4:]
    assert third.of("step", "step") == [5, 6]
    assert third.of("step", "loss") == pytest.approx(want, rel=1e-5)


def test_a_pack_goes_on_from_a_solo_checkpoint(base: Path, held_out: str, tmp_path: Path) -> None:
    run = trial(base, held_out, *SOME["dora"], "train.checkpoint_every=1")
    undisturbed = train_here(run, tmp_path / "solo")
    train_here(run, tmp_path / "pack" / "dora", stop_at=2)
    desk = pack_here(Played(tmp_path / "pack", {"dora": run, "lora": trial(base, *SOME["lora"])}), trial(base))
    assert desk.of("dora", "joined", "step") == [2]
    assert_same(desk, "dora", undisturbed, first=2)


def test_trials_of_one_order_share_its_samples(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from orchestrator.data.order import Shuffled

    taken: list[int] = []
    real = Shuffled.take
    monkeypatch.setattr(Shuffled, "take", lambda self, n: (taken.append(n), real(self, n))[1])
    runs = {f"r{rank}": trial(base, "train.steps=3", f"method.rank={rank}") for rank in (1, 2, 3, 4)}
    runs["other"] = trial(base, "train.steps=3", "train.seed=5", "train.batch_size=3")
    pack_here(Played(tmp_path, runs), trial(base))
    assert sorted(taken) == [3, 3, 3, 4, 4, 4]


def test_classifiers_train_as_they_would_alone(tmp_path: Path) -> None:
    base, texts = tiny.save(tmp_path / "base", "bert"), write(tmp_path / "texts.jsonl")
    common = (f"data.train={texts}", "data.eval_fraction=0.25", *CLASSIFY, "data.length=64", "train.eval_every=2")
    runs = {
        "lora": trial(base, *common, "train.steps=4", "train.batch_size=5"),
        "bitfit": trial(base, *common, "train.steps=4", "method=bitfit", "train.metric=accuracy", "task.pooling=first"),
        "pair": trial(base, *common, "train.steps=2", "method.rank=2", "data.packing=false"),
    }
    desk = pack_here(Played(tmp_path / "pack", runs), trial(base, *common))
    for name, run in runs.items():
        told = train_here(run, tmp_path / "solo" / name)
        assert_same(desk, name, told)
        for metric in ("accuracy", "f1", "mcc"):
            assert desk.of(name, "eval", metric) == told.of("eval", metric)
    (joined,) = [values for t, kind, values in desk.heard if (t, kind) == ("pair", "joined")]
    assert joined["parameters"] == 2 * 2 * (4 * (64 + 64) + 2 * (64 + 128)), "the head is not counted"


@pytest.mark.parametrize("method", ["{peft: {type: VERA, r: 8, target_modules: [q_proj]}, type: peft}", "full"])
def test_what_cannot_mix_trains_in_a_pack_of_one(method: str, base: Path, held_out: str, tmp_path: Path) -> None:
    runs = {
        n: trial(base, held_out, f"method={method}", "train.lr=0.002", f"train.steps={n}", "train.eval_every=1")
        for n in "23"
    }
    desk = pack_here(Played(tmp_path / "pack", runs), trial(base), Limits(slots=1))
    assert [t for t, kind, _ in desk.heard if kind in ("joined", "ended")] == ["2", "2", "3", "3"]
    assert_same(desk, "3", train_here(runs["3"], tmp_path / "solo"))

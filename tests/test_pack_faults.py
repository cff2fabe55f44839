"""What goes wrong in a pack: it is one trial's alone, and costs the others nothing."""

import errno
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from orchestrator.config import Run
from orchestrator.data import Batch
from orchestrator.errors import OutOfMemoryError
from orchestrator.train import pack as pack_module
from orchestrator.train.desk import Lease, Orders
from orchestrator.train.lane import lane_of, pack_run, trains_alone
from orchestrator.train.loss import causal_lm_loss
from orchestrator.train.pack import Limits
from tests import tiny
from tests.classify_kit import write
from tests.launch_kit import train_here
from tests.pack_kit import Played, assert_same, pack_here, trial


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("base"))


def pair(base: Path, *more: str, steps: int = 8) -> dict[str, Run]:
    return {
        "good": trial(base, f"train.steps={steps}", "method.dropout=0.1", *more),
        "also": trial(base, "train.steps=7", "method={type: bottleneck, size: 4}", "train.batch_size=3", *more),
    }


def losses(desk: Played, name: str) -> list[float]:
    return desk.of(name, "step", "loss")


def test_a_trial_that_diverges_ends_alone_and_no_bit_of_the_others_moves(base: Path, tmp_path: Path) -> None:
    spoilt = {"bad": ("method.rank=3", "train.steps=20", "train.warmup=0")}
    told = {}
    for rate in ("1e38", "0.01"):
        runs = {**pair(base), **{n: trial(base, *o, f"train.lr={rate}") for n, o in spoilt.items()}}
        told[rate] = pack_here(Played(tmp_path / rate, runs), trial(base))
    sick, well = told["1e38"], told["0.01"]
    ended = sick.ended("bad")
    assert ended["why"] == "failed"
    assert "not finite 5 times in a row, up to step 6" in ended["reason"]
    assert well.ended("bad")["why"] == "finished"
    for name in ("good", "also"):
        assert losses(sick, name)[:6] == losses(well, name)[:6], "bit for bit, while the shapes are the same"
        assert losses(sick, name) == pytest.approx(losses(well, name), rel=1e-5)
        assert sick.ended(name)["why"] == "finished"
    assert_same(sick, "good", train_here(pair(base)["good"], tmp_path / "solo"))


def test_an_impossible_trial_ends_alone_with_its_reason(base: Path, tmp_path: Path) -> None:
    bad_records = tmp_path / "bad.jsonl"
    bad_records.write_text('{"prompt": 3}\n')
    gone, texts = tmp_path / "gone.jsonl", write(tmp_path / "texts.jsonl")
    gone.write_text("")
    other = tiny.save(tmp_path / "other", seed=4)
    runs = {
        **pair(base),
        "target": trial(base, "method.targets=[nothing_here]", "train.steps=4"),
        "data": trial(base, f"data.train={bad_records}", "train.steps=4"),
        "missing": trial(base, f"data.train={gone}", "train.steps=4"),
        "other": trial(other, "train.steps=4"),
        "solo": trial(base, "method=full", "train.steps=4"),
        "task": trial(base, f"data.train={texts}", "task=classification", "train.steps=4"),
        "init": trial(base, "train.init_from=some@champion", "train.steps=4"),
    }
    desk = Played(tmp_path / "pack", runs, at=dict.fromkeys((n for n in runs if n not in ("good", "also")), 3))
    gone.unlink()
    desk.leases["mistyped"] = Lease("mistyped", "", {"train": {"stepz": 3}})
    pack_here(desk, trial(base))
    reasons = {
        "target": "nothing_here",
        "data": "bad.jsonl:1",
        "missing": "gone.jsonl does not exist",
        "other": "the pack's base is",
        "solo": "trains alone",
        "task": "learns causal_lm",
        "init": "train.init_from",
        "mistyped": "stepz",
    }
    for name, words in reasons.items():
        assert desk.ended(name)["why"] == "failed"
        assert words in desk.ended(name)["reason"]
    undisturbed = pack_here(Played(tmp_path / "undisturbed", pair(base)), trial(base))
    for name in ("good", "also"):
        assert losses(desk, name) == losses(undisturbed, name)


def test_a_bad_record_of_a_stream_ends_its_trial_when_it_is_met(base: Path, tmp_path: Path) -> None:
    records = tmp_path / "stream.jsonl"
    good = {"prompt": "the cat sat", "completion": " on the mat"}
    records.write_text("\n".join(map(json.dumps, [*[good] * 10, {"prompt": 3}])))
    stream = trial(base, f"data.train={records}", "data.streaming=true", "data.shuffle_buffer=4", "train.steps=9")
    desk = pack_here(Played(tmp_path / "pack", {**pair(base), "stream": stream}), trial(base))
    ended = desk.ended("stream")
    assert ended["why"] == "failed"
    assert "stream.jsonl:11" in ended["reason"]
    assert 1 <= ended["step"] <= 2
    told = train_here(pair(base)["good"], tmp_path / "solo")
    assert_same(desk, "good", told)


class Memory:
    """A device that holds so much: the loss fails above it."""

    def __init__(self, too_much: Callable[[Batch], bool]) -> None:
        self.too_much, self.failed, self.most = too_much, 0, 0

    def __call__(self, model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        found = causal_lm_loss(model, batch)  # as on a device, something was computed before it fails
        if self.too_much(batch):
            self.failed += 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        self.most = max(self.most, len(batch.tokens_BT))
        return found


def test_out_of_memory_makes_passes_smaller_and_goes_on(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = pair(base)
    memory = Memory(lambda batch: len(batch.tokens_BT) > 2)
    monkeypatch.setattr(pack_module, "causal_lm_loss", memory)
    desk = pack_here(Played(tmp_path / "pack", runs), trial(base), Limits(slots=4, tokens=4096))
    monkeypatch.undo()
    assert memory.failed
    assert memory.most == 2
    assert [capacity for capacity, _ in desk.shrunk] == [4] * memory.failed
    assert [tokens for _, tokens in desk.shrunk] == [2048 >> n for n in range(memory.failed)]
    assert desk.desk.limits("pack")[1] == desk.shrunk[-1][1]
    assert desk.desk.hello("pack", "") == 4, "a restart knows"
    assert desk.desk.limits("pack")[1] == desk.shrunk[-1][1]
    assert any("out of memory" in values["text"] for t, kind, values in desk.heard if kind == "warning")
    for name, run in runs.items():
        assert_same(desk, name, train_here(run, tmp_path / "solo" / name))


@pytest.mark.parametrize("phase", ["train", "join"])
def test_a_trial_that_does_not_fit_waits_for_a_slot(
    phase: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = {**pair(base, steps=4), "late": trial(base, "train.steps=5", "method.rank=3")}
    desk = Played(tmp_path / "pack", runs, at={"late": 2})
    desk.desk.shrink("pack", 3)

    def crowded(batch: Batch) -> bool:
        joined = {t for t, kind, _ in desk.heard if kind == "joined"}
        gone = {t for t, kind, _ in desk.heard if kind in ("ended", "left")}
        back = len(desk.of("late", "joined", "step")) > 1
        if phase == "join":  # the look at what it costs fails
            return desk.asked >= 2 and "late" not in joined and not gone
        return "late" in joined and not back and not gone and len(desk.of("late", "step", "step")) >= 1

    monkeypatch.setattr(pack_module, "causal_lm_loss", Memory(crowded))
    pack_here(desk, trial(base), Limits(slots=3, tokens=256))
    monkeypatch.undo()
    assert desk.of("late", "left", "step") == ([1] if phase == "train" else [0])
    assert desk.shrunk[-1][0] == 2
    assert desk.of("late", "joined", "step") == ([0, 1] if phase == "train" else [0])
    for name, run in runs.items():
        assert desk.ended(name)["why"] == "finished"
        assert_same(desk, name, train_here(run, tmp_path / "solo" / name))


def test_a_trial_that_does_not_fit_alone_fails(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    desk = Played(tmp_path / "pack", {"large": trial(base, "train.steps=2")})
    monkeypatch.setattr(pack_module, "causal_lm_loss", Memory(lambda _: len(desk.of("large", "joined", "step")) > 0))
    pack_here(desk, trial(base))
    assert desk.ended("large")["why"] == "failed"
    assert "out of memory" in desk.ended("large")["reason"]


def test_a_pack_that_cannot_evaluate_says_how_much_would_fit(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trial(base, "train.steps=2", "train.eval_every=1", "data.eval_fraction=0.01")
    desk = Played(tmp_path / "pack", {"one": run, "two": run})
    late = Memory(lambda _: not torch.is_grad_enabled() and bool(desk.of("two", "step", "step")))
    monkeypatch.setattr(pack_module, "causal_lm_loss", late)
    with pytest.raises(OutOfMemoryError, match="2 trials"):
        pack_here(desk, trial(base))
    assert desk.shrunk[-1][0] == 1


def test_a_full_disk_costs_no_trial_its_training(base: Path, tmp_path: Path) -> None:
    class Full(Played):
        refused = 0

        def checkpoint(self, trial: str, step: int, write: Callable[[Path], None]) -> None:
            def fails(folder: Path) -> None:
                write(folder)
                if trial == "good" and step in (2, 3):
                    self.refused += 1
                    raise OSError(errno.ENOSPC, "No space left on device")

            super().checkpoint(trial, step, fails)

    runs = pair(base, "train.checkpoint_every=1")
    desk = pack_here(Full(tmp_path / "pack", runs), trial(base))
    assert desk.refused == 2
    assert "No space left" in desk.of("good", "warning", "text")[0]
    assert desk.of("good", "saved", "step") == [1, *range(4, 9)]
    assert desk.ended("good")["why"] == "finished"
    assert not list((tmp_path / "pack").rglob(".new-*"))


def test_sharing_out_the_optimizer_is_not_done_and_said(base: Path, tmp_path: Path) -> None:
    desk = pack_here(Played(tmp_path, {"one": trial(base, "train.steps=1")}), trial(base, "shard=2"))
    assert any("as at stage 0" in text for text in desk.of("", "warning", "text"))
    assert desk.of("", "plan", "stage") == [0]
    assert desk.ended("one")["why"] == "finished"


def test_lanes_are_of_trials_that_share_a_base(base: Path, tmp_path: Path) -> None:
    plain, last = trial(base), "method={type: last_layers, layers: 1}"
    shared = lane_of(plain)
    assert lane_of(trial(base, "method=prompt", "data.length=64", "train.seed=3")) == shared
    assert lane_of(trial(base, last)) == shared, "nothing is quantized"
    quantized = trial(base, "base.quantize=nf4")
    assert lane_of(quantized) != shared
    assert lane_of(trial(base, "base.quantize=nf4", last)) not in (shared, lane_of(quantized))
    assert lane_of(trial(base, f"data.train={write(tmp_path / 'a.jsonl')}", "task=classification")) != shared
    assert trains_alone(trial(base, "method=full"))
    assert not trains_alone(plain)
    assert pack_run(trial(base, "method=full")).method.type == "lora"
    assert pack_run(trial(base, "base.quantize=nf4", last)).method.type == "last_layers"


def test_layers_held_otherwise_are_refused(base: Path, tmp_path: Path) -> None:
    last = trial(base, "base.quantize=nf4", "method={type: last_layers, layers: 1}", "train.steps=1")
    lora = trial(base, "base.quantize=nf4", "train.steps=1")
    desk = pack_here(Played(tmp_path / "a", {"last": last, "lora": lora}), pack_run(last))
    assert desk.ended("last")["why"] == "finished"
    assert "a lane of their own" in desk.ended("lora")["reason"]


def test_preemption_saves_every_trial(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pack_module, "_LOOK_S", 0.0)

    class Leaving(Played):
        def preempted(self) -> bool:
            return self.asked == 3

    runs = pair(base, "train.checkpoint_every=99")
    desk = pack_here(Leaving(tmp_path / "pack", runs), trial(base))
    assert desk.of("good", "saved", "step") == [3, 8]
    assert desk.of("also", "saved", "step") == [3, 7]


def test_what_a_killed_pack_held_goes_on_in_the_next(base: Path, tmp_path: Path) -> None:
    class Killed(Played):
        def tell(self, trial: str, kind: str, values: Mapping[str, Any]) -> None:
            super().tell(trial, kind, values)
            if trial == "good" and kind == "step" and values["step"] == 5:
                raise SystemExit("killed")

    runs = pair(base, "train.checkpoint_every=2")
    desk = Killed(tmp_path / "pack", runs)
    with pytest.raises(SystemExit):
        pack_here(desk, trial(base))
    again = Played(tmp_path / "pack", {})
    again.desk = desk.desk
    assert again.desk.hello("pack", "") is None
    pack_here(again, trial(base))
    assert again.of("good", "joined", "step") == [4]
    for name, run in runs.items():
        assert_same(again, name, train_here(run, tmp_path / "solo" / name), first=4)
    shutil.rmtree(tmp_path / "pack")


def test_orders_end_a_pack_that_has_nothing(base: Path, tmp_path: Path) -> None:
    desk = Played(tmp_path, {})
    desk.desk.close()
    assert desk.orders(2) == Orders(close=True)
    pack_here(desk, trial(base))
    assert [kind for _, kind, _ in desk.heard] == ["plan", "loaded"]

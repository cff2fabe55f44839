"""Sixteen trials of ten kinds, no two alike, at most seven at once: each loss is that of its solo run."""

from pathlib import Path

import pytest

from orchestrator.train.pack import Limits
from tests import tiny
from tests.launch_kit import train_here
from tests.pack_kit import Played, assert_same, pack_here, trial

TRIALS = {
    "lora4": "method.rank=4 | train.batch_size=2 | data.length=112 | train.schedule=constant",
    "lora8": "method.rank=8 | method.rslora=true | train.batch_size=6 | train.seed=1",
    "lora16": "method.rank=16 | method.lr_ratio=16 | train.lr=0.002 | train.schedule=linear | train.clip=0.2",
    "dora": "method.rank=4 | method.dora=true | train.seed=2 | data.length=96 | method.dropout=0.1",
    "some": "method.rank=3 | method.targets=[q_proj,down_proj] | train.beta2=0.9 | train.weight_decay=0.2",
    "houlsby": "method={type: bottleneck,size: 6,placement: houlsby} | train.batch_size=3",
    "pfeiffer": "method={type: bottleneck,size: 3,activation: gelu} | train.seed=3 | train.rows_per_pass=1",
    "prompt": "method={type: prompt,tokens: 5} | train.lr=0.1 | train.batch_size=5",
    "prefix": "method={type: prefix,tokens: 4} | train.lr=0.05 | data.length=120 | train.seed=4",
    "ia3": "method=ia3 | train.lr=0.02 | train.warmup=0.5",
    "bitfit": "method=bitfit | train.batch_size=1 | data.length=96",
    "sparse": "method={type: sparse,density: 0.02} | train.seed=5 | train.eps=1e-4",
    "moving": "method={type: sparse,density: 0.01,rechoose_every: 2,choose: random} | train.batch_size=2",
    "norms": "method=norms | train.min_lr=0.3 | data.packing=false",
    "last": "method={type: last_layers,layers: 1} | train.lr=0.001 | train.beta1=0.7",
    "head": "method={type: last_layers,layers: 2,head: true} | train.lr=0.001 | train.seed=6 | train.batch_size=7",
}
AT = {"dora": 2, "pfeiffer": 1, "ia3": 3, "moving": 4, "last": 2}
UNTIL = {"lora8": 4, "bitfit": 2}


@pytest.mark.slow
def test_sixteen_trials_share_a_base_and_none_notices(tmp_path: Path) -> None:
    base = tiny.save(tmp_path / "base", num_hidden_layers=3)
    common = ("data.eval_fraction=0.003", "train.eval_every=2")
    runs = {
        name: trial(base, *common, f"train.steps={4 + number % 5}", *overrides.split(" | "))
        for number, (name, overrides) in enumerate(TRIALS.items())
    }
    desk = pack_here(Played(tmp_path / "pack", runs, AT, UNTIL), trial(base), Limits(slots=7, tokens=1024))
    for name, run in runs.items():
        told = train_here(run, tmp_path / "solo" / name)
        assert_same(desk, name, told, steps=UNTIL.get(name))
        assert desk.ended(name)["why"] == ("withdrawn" if name in UNTIL else "finished")
    most, live = 0, 0
    for _, kind, _ in desk.heard:
        live += (kind == "joined") - (kind == "ended")
        most = max(most, live)
    assert most == 7

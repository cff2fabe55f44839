"""The arrangement that all rests on: the base sharded by ZeRO-3 over real ranks, the bank outside.

A pack's losses must be those of each trial alone in one unsharded process.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests import tiny
from tests.pack_script import NAN_SLOT, NAN_STEP, TRIALS
from tests.ranks import run_ranks


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("base"), num_hidden_layers=4)


@pytest.fixture(scope="module")
def solo(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    """Each trial alone, one rank, nothing sharded."""
    runs = {}
    for slot in TRIALS:
        folder = tmp_path_factory.mktemp(f"solo{slot}")
        (runs[slot],) = run_ranks("tests.pack_script", 1, folder, base=str(base), slots=[slot], stage=0)
    return runs


@pytest.mark.parametrize(
    ("stage", "recompute"),
    [
        (3, False),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in [(3, True), (0, False), (1, False), (2, False)]),
    ],
)
def test_a_pack_on_two_ranks_equals_solo_runs(
    stage: int, recompute: bool, base: Path, solo: dict[int, dict[str, Any]], tmp_path: Path
) -> None:
    reports = run_ranks(
        "tests.pack_script", 2, tmp_path, base=str(base), slots=list(TRIALS), stage=stage, recompute=recompute
    )
    for slot in TRIALS:
        expected = solo[slot]["losses"][str(slot)]
        for report in reports:
            got = report["losses"][str(slot)]
            assert len(got) == len(expected)
            torch.testing.assert_close(torch.tensor(got), torch.tensor(expected), rtol=1e-5, atol=1e-6, equal_nan=True)
        for name, value in solo[slot]["final"][str(slot)].items():
            mine = torch.tensor(reports[0]["final"][str(slot)][name])
            assert reports[0]["final"][str(slot)][name] == reports[1]["final"][str(slot)][name] or slot == NAN_SLOT
            torch.testing.assert_close(mine, torch.tensor(value), rtol=1e-3, atol=2e-5, equal_nan=True)
    nan_from = NAN_STEP - TRIALS[NAN_SLOT][1]
    seen = torch.tensor(reports[0]["losses"][str(NAN_SLOT)])
    assert seen[:nan_from].isfinite().all()
    assert seen[nan_from:].isnan().all()
    if stage == 3:
        assert all(report["held"] * 2 == report["whole"] for report in reports)
        assert all(not any(report["alive"]) for report in reports), "gathered weights outlive their use"

"""Every method trains the same alone and in a mixed pack of four, on one rank and on two that share the base (ZeRO-3).

What all are held against is each case alone, on one rank, nothing sharded; that is held against peft and untouched
transformers models by the methods' own tests.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests import tiny
from tests.contract_script import groups
from tests.methods_kit import CASES
from tests.ranks import run_ranks

Report = dict[str, Any]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def alone(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Report]:
    """Held -> each case alone on one rank."""
    found = {}
    for quantize in ("none", "nf4"):
        folder = tmp_path_factory.mktemp(quantize)
        (found[quantize],) = run_ranks("tests.contract_script", 1, folder, base=str(base), quantize=quantize, stage=0)
    return found


def same(got: Report, want: Report, case: str) -> None:
    losses, expected = torch.tensor(got["losses"][case]), torch.tensor(want["losses"][case])
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-6)
    for name, norm in want["norms"][case].items():
        assert got["norms"][case][name] == pytest.approx(norm, rel=1e-3, abs=1e-4), (case, name)


@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_mixed_packs_on_one_rank(quantize: str, alone: dict[str, Report]) -> None:
    for cases in groups():
        for case in cases:
            same(alone[quantize]["+".join(cases)], alone[quantize][case], case)


@pytest.mark.parametrize(
    ("quantize", "mixed_only"),
    [("nf4", True), *(pytest.param(held, False, marks=pytest.mark.slow) for held in ("nf4", "none"))],
)
def test_two_ranks_that_share_the_base(
    quantize: str, mixed_only: bool, base: Path, alone: dict[str, Report], tmp_path: Path
) -> None:
    arguments = {"base": str(base), "quantize": quantize, "stage": 3, "mixed_only": mixed_only}
    for report in run_ranks("tests.contract_script", 2, tmp_path, **arguments):
        assert len(report) >= len(groups())
        for key, got in report.items():
            for case in key.split("+"):
                same(got, alone[quantize][case], case)
        if not mixed_only:
            assert set(CASES) - {"full"} <= set(report)

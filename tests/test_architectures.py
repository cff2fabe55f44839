"""Every architecture trains on NF4 under ZeRO-3, and two sharded ranks see what one whole process sees."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from orchestrator.base import dense_weight, load_base
from orchestrator.base.linear import NF4Linear
from orchestrator.config import Base
from tests import tiny
from tests.launch_kit import small, train_here
from tests.ranks import run_ranks

Reports = dict[str, Any]
ALL = [*tiny.CONFIGS, "mixtral-dense"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "tales.jsonl"
    animals, places = ("cat", "dog", "cow", "hen"), ("mat", "house", "barn")
    tales = [
        {"prompt": f"where is the {a}?", "completion": f"the {a} sat on the {p} again" * (n % 4 + 1)}
        for n, (a, p) in enumerate([(a, p) for a in animals for p in places], 1)
    ]
    path.write_text("\n".join(map(json.dumps, tales)))
    return path


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("bases")
    return {
        **{name: str(tiny.save(folder / name, name)) for name in tiny.CONFIGS},
        "mixtral-dense": str(tiny.save(folder / "mixtral", "mixtral")),
        "mixtral": str(folder / "mixtral"),
    }


@pytest.fixture(scope="module")
def sharded(bases: dict[str, str], data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Reports]:
    folder = tmp_path_factory.mktemp("sharded")
    return run_ranks("tests.architecture_script", 2, folder, bases=bases, data=str(data), stage=3)


@pytest.fixture(scope="module")
def whole(bases: dict[str, str], data: Path, tmp_path_factory: pytest.TempPathFactory) -> Reports:
    folder = tmp_path_factory.mktemp("whole")
    return run_ranks("tests.architecture_script", 1, folder, bases=bases, data=str(data), stage=0)[0]


@pytest.mark.parametrize("name", ALL)
def test_two_sharded_ranks_train_as_one_whole_process(name: str, sharded: list[Reports], whole: Reports) -> None:
    assert "error" not in whole[name], whole[name]
    for report in sharded:
        for key in ("losses", "norms"):
            torch.testing.assert_close(
                torch.tensor(report[name][key]), torch.tensor(whole[name][key]), rtol=1e-5, atol=1e-6
            )
        fraction = report[name]["quantized_fraction"]  # the rest are norms and biases
        assert fraction == 0 if name.endswith("-dense") else fraction > 0.95
        assert report[name]["bytes_here"] < 0.75 * report[name]["bytes_total"]
    assert whole[name]["losses"][0] != whole[name]["losses"][1]


def test_experts_that_would_stay_dense_are_refused_with_the_reason(sharded: list[Reports], whole: Reports) -> None:
    for report in (*sharded, whole):
        assert report["mixtral"]["error"] == "BaseModelError"
        assert "experts" in report["mixtral"]["message"]
        assert "quantize" in report["mixtral"]["message"]


@pytest.mark.parametrize("name", list(tiny.CONFIGS))
def test_the_first_loss_is_that_of_transformers_on_the_dequantized_base(
    name: str, bases: dict[str, str], data: Path, tmp_path: Path
) -> None:
    """A fresh LoRA adds nothing, so transformers' own forward pass, one sample at a time, must give the same loss."""
    run = small(f"base={bases[name]}", f"data={data}", "train.steps=1", "train.batch_size=12")
    (loss,) = train_here(run, tmp_path).of("step", "loss")
    theirs = dequantized(bases[name])
    tokenizer = tiny.tokenizer()
    total, count = 0.0, 0
    for line in data.read_text().splitlines():
        record = json.loads(line)
        turns = [
            {"role": "user", "content": record["prompt"]},
            {"role": "assistant", "content": record["completion"]},
        ]
        made = tokenizer.apply_chat_template(
            turns, return_dict=True, return_assistant_tokens_mask=True, return_tensors="pt"
        )
        tokens_1T, mask_T = made["input_ids"], torch.as_tensor(made["assistant_masks"]).view(-1).bool()
        assert tokens_1T.shape[1] <= run.data.length
        with torch.no_grad():
            log_p_TV = theirs(tokens_1T).logits[0, :-1].log_softmax(-1)
        losses_T = -log_p_TV.gather(1, tokens_1T[0, 1:, None])[:, 0]
        total += float(losses_T[mask_T[1:]].sum())
        count += int(mask_T[1:].sum())
    assert loss == pytest.approx(total / count, rel=1e-5)


def dequantized(base: str) -> Any:
    """transformers' own model with the weights that the NF4 base stands for."""
    ours = load_base(Base(id=base, quantize="nf4")).model
    theirs = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    for name, module in ours.named_modules():
        if isinstance(module, NF4Linear):
            weight_OI = dense_weight(module)
            target = theirs.get_submodule(name).weight
            target.data.copy_(weight_OI.T if module.transposed else weight_OI)
    return theirs.eval()

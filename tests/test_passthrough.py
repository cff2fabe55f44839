"""Types of the peft library handed through: a run has the losses of peft's own model in a plain torch loop."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftModel, get_peft_model
from rich.console import Console
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from orchestrator.base import load_base, load_tokenizer
from orchestrator.config import Base, Classification, Lora, Peft, Run
from orchestrator.config.load import load_run
from orchestrator.data import prepare
from orchestrator.delta import load_delta, new_manifest, save_delta
from orchestrator.errors import ConfigError, DeltaError, MethodError
from orchestrator.launch.train import Outcome
from orchestrator.methods import Bank, from_files, knobs_from_peft
from orchestrator.preview import measure
from orchestrator.registry import Version
from orchestrator.report import tell
from orchestrator.train.schedule import lr_at
from tests import tiny
from tests.endpoint_kit import IDENTITY, Server
from tests.launch_kit import SMALL, train_here, weights
from tests.ranks import run_ranks

TOKENS_BT = torch.randint(3, tiny.VOCAB, (2, 12), generator=torch.Generator().manual_seed(1))
STEPS = 4
QV: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"]}
RUN: dict[str, dict[str, Any]] = {
    "VERA": {"r": 16, **QV},
    "LOHA": {"r": 4, **QV},
    "LOKR": {"r": 4, "alpha": 8, **QV},
    "OFT": {"oft_block_size": 8, **QV},
    "BOFT": {"boft_block_size": 8, **QV},
    "IA3": {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "LORA": {"r": 4, "bias": "lora_only", "target_modules": ["q_proj"], "modules_to_save": ["norm"]},
}
MORE: dict[str, dict[str, Any]] = {
    "BEFT": QV,
    "C3A": {"block_size": 16, **QV},
    "DEFT": QV,
    "DELORA": QV,
    "FOURIERFT": {"n_frequency": 50, **QV},
    "FROD": QV,
    "GLORA": QV,
    "GRALORA": {"r": 8, **QV},
    "HIRA": QV,
    "HRA": QV,
    "LILY": QV,
    "LN_TUNING": {"target_modules": ["input_layernorm"]},
    "MISS": {"r": 8, **QV},
    "OSF": QV,
    "PEANUT": QV,
    "PSOFT": QV,
    "PVERA": {"r": 8, **QV},
    "RANDLORA": {"r": 8, **QV},
    "ROAD": {"group_size": 32, **QV},
    "SHIRA": {"r": 4, **QV},
    "SUPERTUNING": QV,
    "TINYLORA": QV,
    "TRAINABLE_TOKENS": {"token_indices": list(range(3, 200))},
    "UNILORA": QV,
    "VBLORA": {"r": 2, "num_vectors": 16, "vector_length": 32, "topk": 2, **QV},
    "WAVEFT": {"n_frequency": 50, **QV},
}
LOOSE = {
    "DEFT": 1e-3,  # amplifies rounding
    "LILY": 1e-3,  # mixes experts by a mean over all tokens of a pass, so it sees how samples are batched
    "PVERA": 0.01,  # draws numbers in training
}
REFUSED = {
    "ADALORA": "update_and_allocate",
    "ADAMSS": "update_and_allocate",
    "ADAPTION_PROMPT": "whole attention modules",
    "CARTRIDGE": "method: prompt or prefix",
    "CPT": "method: prompt or prefix",
    "MULTITASK_PROMPT_TUNING": "method: prompt or prefix",
    "POLY": "peft's own wrapper",
    "PREFIX_TUNING": "method: prompt or prefix",
    "PROMPT_TUNING": "method: prompt or prefix",
    "P_TUNING": "method: prompt or prefix",
    "SHADOW": "peft's own wrapper",
    "XLORA": "peft's own wrapper",
}


def run_of(folder: Path, kind: str, options: dict[str, Any], *more: str) -> Run:
    records = folder / "records.jsonl"
    if not (folder / "config.json").exists():
        tiny.save(folder, attention_bias=kind == "LORA")
        lines = [{"prompt": f"the cat {n} sat", "completion": f" on the {'mat ' * (n % 4 + 1)}{n}"} for n in range(12)]
        records.write_text("".join(json.dumps(line) + "\n" for line in lines))
    method = json.dumps({"peft": {"type": kind, **options}})
    own = [
        f"base.id={folder}",
        "base.quantize=none",
        f"data={records}",
        f"train.steps={STEPS}",
        "train.schedule=constant",
    ]
    return load_run(None, [*SMALL, *own, "train.warmup=0", "train.clip=0", f"method={method}", *more])


def by_hand(run: Run) -> tuple[Any, list[float]]:
    """peft's model after a plain loop over the run's samples, and its losses."""
    options = {k: v for k, v in run.method.peft.items() if k != "type"}
    model = AutoModelForCausalLM.from_pretrained(run.base.id, dtype=torch.float32)
    torch.manual_seed(run.train.seed)
    peft: Any = get_peft_model(model, PEFT_TYPE_TO_CONFIG_MAPPING[run.method.peft["type"]](**options))
    data = prepare(run.data, load_tokenizer(run.base), seed=run.train.seed)
    train = run.train.model_copy(update={"lr": run.lr})
    optimizer = torch.optim.AdamW(
        [p for p in peft.parameters() if p.requires_grad],
        lr=run.lr,
        betas=(train.beta1, train.beta2),
        eps=train.eps,
        weight_decay=train.weight_decay,
    )
    losses = []
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = lr_at(train, step, STEPS)
        samples = data.train.take(train.batch_size)
        total = torch.zeros(())
        for sample in samples:
            logits_TV = peft(input_ids=torch.tensor([sample.tokens])).logits[0]
            next_T, trained_T = torch.tensor(sample.tokens[1:]), torch.tensor(sample.trained[1:])
            total = total + cross_entropy(logits_TV[:-1], next_T, reduction="none")[trained_T].sum()
        loss = total / sum(s.targets for s in samples)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return peft.eval(), losses


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS_BT, use_cache=False).logits


def in_peft(run: Run, delta: Path) -> torch.Tensor:
    base = AutoModelForCausalLM.from_pretrained(run.base.id, dtype=torch.float32)
    return logits(PeftModel.from_pretrained(base, delta).eval())


def _sorted(value: Any) -> Any:
    return sorted(value) if isinstance(value, list) else value


def trains(kind: str, options: dict[str, Any], folder: Path) -> None:
    run = run_of(folder / "base", kind, options)
    reporter = train_here(run, folder / "out")
    theirs, losses = by_hand(run)
    near = LOOSE.get(kind, 1e-4)
    assert reporter.of("step", "loss") == pytest.approx(losses, rel=near)
    assert abs(losses[0] - losses[-1]) > 1e-4
    delta = reporter.latest / "delta" / "delta"
    saved = in_peft(run, delta)
    if near == 1e-4:
        torch.testing.assert_close(saved, logits(theirs), rtol=1e-3, atol=1e-3)
    # The folder is peft's own.
    theirs.save_pretrained(folder / "theirs")
    assert {n: t.shape for n, t in weights(delta).items()} == {
        n: t.shape for n, t in weights(folder / "theirs").items()
    }
    ours, wanted = (json.loads((f / "adapter_config.json").read_text()) for f in (delta, folder / "theirs"))
    different = {key for key in wanted if _sorted(ours[key]) != _sorted(wanted[key])}
    assert different <= {"task_type", "base_model_name_or_path", "auto_mapping"}
    # A fresh base with what was saved is the same model; without it, the base.
    base = load_base(run.base).model
    plain = logits(base)
    loaded = load_delta(delta)
    bank = Bank(base)
    knobs = loaded.manifest.method
    assert isinstance(knobs, Peft)
    bank.add(0, knobs, tensors=from_files(knobs, None, loaded.tensors, bank.scope), seed=run.train.seed)
    with bank.routed(torch.zeros_like(TOKENS_BT)):
        torch.testing.assert_close(logits(base), saved, rtol=1e-5, atol=1e-5)
    assert loaded.manifest.parameters == sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    if kind in ("FROD", "SHIRA"):
        with pytest.raises(MethodError, match="reads the base's weights when it starts"):
            measure(run, gpu=False)
    else:
        assert measure(run, gpu=False).trained == loaded.manifest.parameters
    bank.detach()
    torch.testing.assert_close(logits(base), plain)
    assert (saved - plain).abs().max() > 1e-3


@pytest.mark.filterwarnings("ignore:Failed to load the CUDA extension", "ignore:Setting boft_n_butterfly")  # BOFT's
@pytest.mark.parametrize("kind", RUN)
def test_a_type_trains_as_in_peft(kind: str, tmp_path: Path) -> None:
    trains(kind, RUN[kind], tmp_path)


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore:Sparse invariant checks", "ignore:Detected that the base layer has no bias", "ignore:Unsupported layer type"
)  # peft's own
@pytest.mark.parametrize("kind", MORE)
def test_more_types_train_as_in_peft(kind: str, tmp_path: Path) -> None:
    trains(kind, MORE[kind], tmp_path)


def test_every_type_of_peft_is_run_or_refused() -> None:
    assert {str(kind.value) for kind in PEFT_TYPE_TO_CONFIG_MAPPING} == {*RUN, *MORE, *REFUSED}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_type_that_needs_pefts_wrapper_is_refused(kind: str, tmp_path: Path) -> None:
    run = run_of(tmp_path / "base", kind, {})
    for refuses in (lambda: train_here(run, tmp_path / "out"), lambda: measure(run, gpu=False)):
        with pytest.raises(MethodError, match=f"{kind} .*{REFUSED[kind]}"):
            refuses()


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ({"type": "VERRA"}, "no type 'VERRA'; nearest is VERA, all are ADALORA, ADAMSS"),
        ({"type": "VERA", "rank": 4}, "VERA has no option 'rank', nearest is"),
        ({"type": "LOHA", "target_module": ["q_proj"]}, "no option 'target_module', nearest is 'target_modules'"),
        ({"type": "LOHA", "target_modules": ["v_proj", "q_porj"]}, "'q_porj' is no module .* nearest is 'q_proj'"),
        ({"type": "LORA", "alora_invocation_tokens": [1]}, "alora_invocation_tokens needs peft's own"),
        ({"type": "OFT", "r": 7, "oft_block_size": 5, **QV}, "peft refuses these options of OFT|peft cannot put OFT"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_mistakes_are_named(method: dict[str, Any], said: str, tmp_path: Path) -> None:
    options = {key: value for key, value in method.items() if key != "type"}
    run = run_of(tmp_path / "base", method["type"], options)
    with pytest.raises(MethodError, match=said):
        train_here(run, tmp_path / "out")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("base.quantize=nf4", r"base.quantize .*: nf4: method peft needs a dense base"),
        ("shard=3", r"cluster.zero.stage .*: stage 3: method peft needs a dense base"),
        ("method={peft: {r: 4}}", "its type is missing"),
    ],
)
def test_what_the_config_can_tell_is_refused_there(more: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        run_of(tmp_path / "base", "VERA", {"r": 4}, more)


def test_a_short_name_and_silent_targets_are_settled(tmp_path: Path) -> None:
    run = run_of(tmp_path / "base", "vera", {"r": 4})
    reporter = train_here(run, tmp_path / "out")
    delta = load_delta(reporter.latest / "delta" / "delta")
    assert delta.manifest.method.peft == {"type": "VERA", "r": 4, "target_modules": ["q_proj", "v_proj"]}
    assert delta.peft_config["target_modules"] == ["q_proj", "v_proj"]
    assert knobs_from_peft(delta.peft_config).peft.items() > delta.manifest.method.peft.items()


def test_a_stopped_run_goes_on_and_another_continues_it(tmp_path: Path) -> None:
    options = {"r": 4, "module_dropout": 0.3, "alpha": 4, **QV}
    run = run_of(tmp_path / "base", "LOHA", options)
    whole = train_here(run, tmp_path / "whole")
    train_here(run, tmp_path / "parts", stop_at=2)
    again = train_here(run, tmp_path / "parts")
    assert again.of("step", "step") == [3, 4]
    assert again.of("step", "loss") == whole.of("step", "loss")[2:]
    one, two = (weights(r.latest / "delta" / "delta") for r in (whole, again))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    start = whole.latest / "delta" / "delta"
    further = train_here(run, tmp_path / "further", start=start)
    assert load_delta(further.latest / "delta" / "delta").manifest.parent == load_delta(start).sha256
    other = run_of(tmp_path / "base", "LOHA", {**options, "r": 8})
    with pytest.raises(MethodError, match="keeps the delta's method and size"):
        train_here(other, tmp_path / "other", start=start)
    # A plain peft folder serves as well.
    (start / "manta.json").unlink()
    assert train_here(run, tmp_path / "plain", start=start).of("step", "loss") == further.of("step", "loss")


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_two_ranks_do_what_one_does(stage: int, tmp_path: Path) -> None:
    options = {"r": 4, **QV}
    run = run_of(tmp_path / "base", "LOHA", options, f"shard={stage}")
    alone = train_here(run, tmp_path / "alone")
    reports = run_ranks("tests.passthrough_script", 2, tmp_path / "ranks", run=run.model_dump(mode="json"))
    for report in reports:
        assert report["losses"] == pytest.approx(alone.of("step", "loss"), rel=1e-5)
    ours, theirs = (weights(f / "delta" / "delta") for f in (alone.latest, Path(reports[0]["latest"])))
    for name, tensor in ours.items():
        torch.testing.assert_close(theirs[name], tensor, rtol=1e-3, atol=1e-4)


def test_an_endpoint_refuses_it(tmp_path: Path) -> None:
    manifest = new_manifest(name="vera", base=IDENTITY, method=Peft(peft={"type": "VERA", **QV}))
    save_delta(tmp_path / "vera", {"base_model.vera_A": torch.ones(2, 2)}, manifest, {"peft_type": "VERA"})
    with pytest.raises(MethodError, match=r"vera: .* cannot stand beside other deltas"):
        Server(deltas=[str(tmp_path / "vera")])


def test_an_endpoint_refuses_a_classification(tmp_path: Path) -> None:
    task, knobs = Classification(labels=("a", "b")), Lora(targets=("q_proj",))
    manifest = new_manifest(name="moods", base=IDENTITY, method=knobs, task=task)
    save_delta(tmp_path / "moods", {"score.weight": torch.ones(2, 2)}, manifest, {"peft_type": "MANTA"})
    with pytest.raises(MethodError, match=r"moods is a classification delta: .* `manta eval` runs it"):
        Server(deltas=[str(tmp_path / "moods")])


@pytest.mark.parametrize(
    ("method", "task", "said"),
    [
        ("lora", "causal_lm", "serve it  manta serve deltas=x:3"),
        ("lora", "classification", "try it    manta eval x:3 --data FILE"),
        ("peft", "causal_lm", "use it    with the peft library, from: manta deltas export x:3 --peft DIR"),
    ],
)
def test_the_end_of_a_run_says_what_holds(method: str, task: str, said: str, tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=200)
    tags = {"manta.method": method, "manta.task": task}
    version = Version("x", 3, "a" * 64, (), None, "", "2026-01-01T00:00:00Z", tags)
    tell(Outcome("x-1", "finished", tmp_path, {}, version, "sqlite:///x"), console)
    text = console.file.getvalue()
    assert said in text
    assert ("manta serve" in text) == (said.startswith("serve"))


def test_it_stands_alone(tmp_path: Path) -> None:
    model = load_base(Base(id=str(tiny.save(tmp_path)), quantize="none")).model
    bank = Bank(model)
    bank.add(0, Lora(rank=2))
    with pytest.raises(MethodError, match="stands alone"):
        bank.add(1, Peft(peft={"type": "LOHA", **QV}))
    bank.remove(0)
    bank.add(1, Peft(peft={"type": "LOHA", **QV}))
    with pytest.raises(MethodError, match="stands alone"):
        bank.add(0, Lora(rank=2))
    with pytest.raises(MethodError, match="another slot, or of the bare base"), bank.routed(torch.tensor([[1], [-1]])):
        pass
    with pytest.raises(MethodError, match="keeps its"):
        bank.resize(1, Peft(peft={"type": "LOHA", "r": 2, **QV}))
    values = bank.tensors(1)
    bank.remove(1)
    with pytest.raises(DeltaError, match="is missing"):
        bank.add(1, Peft(peft={"type": "LOHA", **QV}), tensors=dict(list(values.items())[1:]))
    assert bank.slots == ()
    assert not any("loha" in type(m).__name__.lower() for m in model.modules())

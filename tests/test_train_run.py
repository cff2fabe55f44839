"""What a run does with its data and time: on Ray once, for the rest in this process with a folder in Ray's place."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import peft
import pytest
import torch
from mlflow.tracking import MlflowClient
from transformers import AutoModelForCausalLM

from orchestrator.base import base_dir, dense_weight, load_base
from orchestrator.base.linear import NF4Linear
from orchestrator.config import Run
from orchestrator.data.demo import demo_records
from orchestrator.errors import DeltaError, MethodError, TrainError, WrongBaseError
from orchestrator.launch.train import Outcome, train
from orchestrator.methods import Bank
from orchestrator.train.setup import Place
from orchestrator.train.worker import work
from tests import tiny
from tests.launch_kit import Folder, Heard, assert_same_bits, local_ray, small, train_here, weights


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "held.jsonl"
    path.write_text("\n".join(map(json.dumps, demo_records("test", 6))))
    return path


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    with local_ray() as address:
        yield address


# ---- one run on Ray: two ranks, NF4 under ZeRO-3, the demo base


@dataclass(frozen=True)
class Done:
    run: Run
    outcome: Outcome
    heard: Heard
    store: str


@pytest.fixture(scope="module")
def done(cluster: str, held_out: Path, tmp_path_factory: pytest.TempPathFactory) -> Done:
    folder = tmp_path_factory.mktemp("run")
    run = small(
        "name=orders",
        "shard=3",
        "cluster.workers=2",
        f"cluster.storage={folder}/storage",
        f"data.eval={held_out}",
        "train.steps=6",
        "train.eval_every=3",
        "train.checkpoint_every=2",
        "train.keep=2",
        "method.rank=4",
        f"tracking.uri=sqlite:///{folder}/mlflow.db",
        "tracking.owner=ann",
        "tracking.tags={team: sales}",
    )
    heard = Heard()
    return Done(run, train(run, listen=heard), heard, f"sqlite:///{folder}/mlflow.db")


def test_the_base_was_sharded_over_two_ranks(done: Done) -> None:
    assert done.heard.of("plan", "stage") == [3]
    assert done.heard.of("started", "ranks") == [2]
    (loaded,) = [values for kind, values in done.heard.events if kind == "loaded"]
    assert loaded["bytes_here"] < 0.6 * loaded["bytes_total"]
    assert done.outcome.why == "finished"
    assert done.outcome.complete


def test_mlflow_holds_metrics_over_time_and_params(done: Done) -> None:
    client = MlflowClient(done.store)
    version = client.get_model_version_by_alias("orders", "candidate")
    run = client.get_run(version.run_id)
    history = sorted((m.step, m.value) for m in client.get_metric_history(run.info.run_id, "loss") if m.step)
    assert [step for step, _ in history] == [1, 2, 3, 4, 5, 6]
    assert [value for _, value in history] == pytest.approx(done.heard.of("step", "loss"))
    assert history[-1][1] < history[0][1]
    assert [m.step for m in client.get_metric_history(run.info.run_id, "eval_loss") if m.step] == [3, 6]
    assert run.info.status == "FINISHED"
    assert run.data.params["method.rank"] == "4"
    assert run.data.params["cluster.zero.stage"] == "3"
    assert run.data.tags["team"] == "sales"
    assert run.data.tags["manta.run"] == done.outcome.run_id
    assert done.outcome.version is not None
    assert int(version.version) == done.outcome.version.version == 1


def test_the_manifest_says_where_the_delta_is_from(done: Done) -> None:
    manifest = json.loads((done.outcome.delta / "manta.json").read_text())
    assert manifest["name"] == "orders"
    assert manifest["owner"] == "ann"
    assert manifest["method"]["rank"] == 4
    assert manifest["metrics"]["eval_loss"] == pytest.approx(done.outcome.metrics["eval_loss"])
    assert manifest["base"]["recipe"] == "nf4-double/fp32"


def test_plain_peft_loads_the_delta_with_equal_logits(done: Done) -> None:
    ours = load_base(done.run.base)
    dense = AutoModelForCausalLM.from_pretrained(base_dir(done.run.base), dtype=torch.float32)
    for name, module in ours.model.named_modules():
        if isinstance(module, NF4Linear):
            dense.get_submodule(name).weight.data.copy_(dense_weight(module))
    text = demo_records("test", 1)[0]["prompt"]
    tokens_1T = ours.tokenizer(text, return_tensors="pt").input_ids
    bank = Bank(ours.model)
    tensors = {n.removeprefix("base_model.model."): t for n, t in weights(done.outcome.delta).items()}
    bank.add(0, done.run.method, tensors=tensors)
    with torch.no_grad():
        bare_1TV = dense(tokens_1T).logits
        theirs_1TV = peft.PeftModel.from_pretrained(dense, done.outcome.delta).eval()(tokens_1T).logits
        with bank.routed(torch.zeros_like(tokens_1T)):
            ours_1TV = ours.model(tokens_1T).logits
    torch.testing.assert_close(ours_1TV, theirs_1TV, rtol=1e-4, atol=1e-4)
    assert (theirs_1TV - bare_1TV).abs().max() > 0.05, "the delta must do something for this to show anything"


def test_only_the_last_checkpoints_are_kept(done: Done) -> None:
    storage = Path(str(done.run.cluster.storage)) / done.outcome.run_id
    assert sorted(p.name for p in storage.glob("step-*")) == ["step-00000004", "step-00000006"]
    size = sum(p.stat().st_size for p in storage.rglob("*") if p.is_file())
    assert size < 4 * 2**20, "checkpoints hold deltas, not the base"


@pytest.mark.slow
def test_an_elastic_run_starts_with_the_workers_that_are_there(cluster: str, base: Path, tmp_path: Path) -> None:
    heard = Heard()
    run = small(
        f"base={base}",
        "cluster.workers={min: 1, max: 2}",
        "cluster.cpus_per_worker=2",  # the cluster has two cores: one worker fits
        f"cluster.storage={tmp_path}",
        "train.steps=3",
        f"tracking.uri=sqlite:///{tmp_path}/mlflow.db",
    )
    outcome = train(run, listen=heard)
    assert outcome.why == "finished"
    assert heard.of("started", "ranks") == [1]


# ---- the loop, in this process


def evaluated(base: Path, held_out: Path, *more: str) -> Run:
    return small(f"base={base}", f"data.eval={held_out}", "train.eval_every=1", "train.schedule=constant", *more)


def test_the_best_delta_is_kept_beside_the_last(base: Path, held_out: Path, tmp_path: Path) -> None:
    """One record learnt by heart makes the last delta worse on others than an earlier one."""
    one = tmp_path / "one.jsonl"
    one.write_text(json.dumps({"prompt": "the cat", "completion": "sat on the mat"}))
    run = evaluated(base, held_out, f"data={one}", "train.steps=8", "train.lr=0.1", "train.checkpoint_every=1")
    heard = train_here(run, tmp_path)
    losses = heard.of("eval", "eval_loss")
    best = min(range(8), key=losses.__getitem__)
    assert best < 7, losses
    assert heard.of("eval", "best_step")[-1] == best + 1
    assert heard.latest is not None
    kept, then = heard.latest / "delta" / "best", tmp_path / f"step-{best + 1:08d}" / "delta" / "delta"
    assert_same_bits(weights(kept), weights(then))
    assert not torch.equal(*(next(iter(weights(f).values())) for f in (kept, heard.latest / "delta" / "delta")))


def test_training_stops_early_when_nothing_improves(base: Path, held_out: Path, tmp_path: Path) -> None:
    run = evaluated(base, held_out, "train.steps=30", "train.lr=3", "train.clip=0", "train.early_stopping=2")
    heard = train_here(run, tmp_path)
    losses = heard.of("eval", "eval_loss")
    best = min(range(len(losses)), key=losses.__getitem__)
    assert heard.of("done", "why") == ["stopped early"]
    assert len(losses) == best + 3 < 30, "two evaluations after the best"
    assert heard.latest is not None
    assert heard.latest.name == f"step-{len(losses):08d}"


@pytest.mark.parametrize("method", ["method.dropout=0", "method.dropout=0.2"])
def test_a_resumed_run_has_the_same_bits(method: str, base: Path, held_out: Path, tmp_path: Path) -> None:
    run = evaluated(base, held_out, "train.steps=7", "train.schedule=cosine", "train.weight_decay=0.1", method)
    whole = train_here(run, tmp_path / "whole")
    first = train_here(run, tmp_path / "parts", stop_at=3)
    assert first.of("done", "step") == [3]
    second = train_here(run, tmp_path / "parts")
    assert second.of("step", "step") == [4, 5, 6, 7]
    assert first.of("step", "loss") + second.of("step", "loss") == whole.of("step", "loss")
    assert first.of("eval", "eval_loss") + second.of("eval", "eval_loss") == whole.of("eval", "eval_loss")
    assert whole.latest is not None
    assert second.latest is not None
    for part in ("delta", "best"):
        assert_same_bits(weights(whole.latest / "delta" / part), weights(second.latest / "delta" / part))


def test_a_target_without_match_ends_before_all_that_is_slow(base: Path, tmp_path: Path) -> None:
    """No data tokenized, no weights read: of a large base that is many minutes."""
    reporter = Folder(tmp_path)
    place = Place(rank=0, ranks=1, local_ranks=1, device=torch.device("cpu"))
    with pytest.raises(MethodError, match=r"'q_prj' matches no .* nearest is 'q_proj'"):
        work(small(f"base={base}", "method.targets=[q_prj]"), place, reporter)
    assert reporter.events == []


def test_a_node_that_will_go_is_answered_with_a_checkpoint(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once, not at the next one due: what comes after it may be lost."""
    monkeypatch.setattr("orchestrator.train.loop._LOOK_S", 0.0)
    monkeypatch.setattr(Folder, "preempted", lambda self: self.of("step", "step")[-1] == 3)
    train_here(small(f"base={base}", "train.steps=5", "train.checkpoint_every=100"), tmp_path)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["step-00000003", "step-00000005"]


def test_the_global_batch_does_not_depend_on_rows_per_pass(base: Path, tmp_path: Path) -> None:
    """Accumulating one row at a time, or all at once, packed or not: the same losses."""
    runs = [
        train_here(small(f"base={base}", "train.steps=3", "train.batch_size=6", *how), tmp_path / str(i))
        for i, how in enumerate(
            [("train.rows_per_pass=8",), ("train.rows_per_pass=1",), ("data.packing=false", "train.recompute=true")]
        )
    ]
    for other in runs[1:]:
        assert other.of("step", "loss") == pytest.approx(runs[0].of("step", "loss"), rel=1e-5)


# ---- continuing from a delta


@pytest.fixture(scope="module")
def parent(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parent")
    heard = train_here(small(f"base={base}", "train.steps=3", "method.rank=4", "train.warmup=0"), folder)
    assert heard.latest is not None
    return heard.latest / "delta" / "delta"


def test_a_run_continues_from_our_delta(base: Path, parent: Path, tmp_path: Path) -> None:
    run = small(f"base={base}", "train.steps=1", "train.lr=1e-9", f"train.init_from={parent}")
    heard = train_here(run, tmp_path, start=parent)
    assert heard.latest is not None
    child = heard.latest / "delta" / "delta"
    for name, value in weights(child).items():
        torch.testing.assert_close(value, weights(parent)[name], rtol=0, atol=1e-7)
    manifest, before = (json.loads((p / "manta.json").read_text()) for p in (child, parent))
    assert manifest["parent"] == before["sha256"]
    assert manifest["method"] == before["method"], "rank 4, though the run's default is another"


def test_a_run_continues_from_a_peft_directory(base: Path, tmp_path: Path) -> None:
    """Its first loss is peft's own."""
    torch.manual_seed(1)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    theirs = peft.get_peft_model(plain, config).eval()
    theirs.save_pretrained(tmp_path / "peft")
    tokens = list(range(10, 40))
    text = tmp_path / "text.jsonl"
    tokenizer = tiny.tokenizer()
    text.write_text(json.dumps({"text": tokenizer.decode(tokens)}))
    run = small(
        f"base={base}",
        "base.quantize=none",
        f"data={text}",
        "train.steps=1",
        "train.batch_size=1",
        f"train.init_from={tmp_path}/peft",
    )
    heard = train_here(run, tmp_path / "run", start=tmp_path / "peft")
    ids_1T = torch.tensor([[*tokenizer.encode(tokenizer.decode(tokens)), tokenizer.eos_token_id]])
    with torch.no_grad():
        expected = theirs(ids_1T, labels=ids_1T).loss
    assert heard.of("step", "loss")[0] == pytest.approx(float(expected), rel=1e-5)
    assert heard.latest is not None
    saved = json.loads((heard.latest / "delta" / "delta" / "adapter_config.json").read_text())
    assert saved["r"] == 3
    assert sorted(saved["target_modules"]) == ["down_proj", "q_proj"]


def test_a_run_that_asks_for_another_size_than_its_parent_is_told(base: Path, parent: Path, tmp_path: Path) -> None:
    run = small(f"base={base}", "train.steps=1", "method.rank=8", f"train.init_from={parent}")
    with pytest.raises(MethodError, match=r"rank=8 \(the delta has 4\)"):
        train_here(run, tmp_path, start=parent)


def test_a_parent_of_another_base_is_refused_with_both_hashes(parent: Path, tmp_path: Path) -> None:
    other = tiny.save(tmp_path / "other", seed=1)
    with pytest.raises(WrongBaseError) as told:
        train_here(small(f"base={other}", "train.steps=1"), tmp_path / "run", start=parent)
    wanted = json.loads((parent / "manta.json").read_text())["base"]["source_hash"]
    assert wanted in str(told.value)
    assert not (tmp_path / "run").exists()


def test_a_corrupt_parent_is_refused(base: Path, parent: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in parent.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    with (broken / "adapter_model.safetensors").open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(DeltaError, match=r"adapter_model\.safetensors"):
        train_here(small(f"base={base}", "train.steps=1"), tmp_path / "run", start=broken)


def test_a_run_whose_loss_is_not_finite_ends_with_advice(base: Path, tmp_path: Path) -> None:
    run = small(f"base={base}", "train.steps=30", "train.lr=1e30", "train.clip=0", "train.warmup=0")
    with pytest.raises(TrainError, match=r"train\.lr"):
        train_here(run, tmp_path)

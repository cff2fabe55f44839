"""The preview shows what would happen, and starts nothing. Truths: hand counts, peft, a loaded base."""

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from orchestrator.base import load_base, load_tokenizer
from orchestrator.config import Base, Cluster, Data, Lora, Run, Source, Tracking, Train, Workers, Zero
from orchestrator.config.method import Prompt
from orchestrator.data import Sample
from orchestrator.data.demo import demo_records
from orchestrator.delta import save_delta
from orchestrator.errors import BaseModelError, ConfigError, DataError, MethodError, RegistryError
from orchestrator.methods import METHODS, Bank
from orchestrator.preview import measure, preview
from orchestrator.preview_samples import EDGE, pieces
from tests import tiny

GREEN, PLAIN = "\x1b[1;32m", "\x1b[0m"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return Base(id=str(tiny.save(tmp_path_factory.mktemp("preview") / "llama")), quantize="none")


@pytest.fixture(autouse=True)
def _no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def shown(run: Run, address: str | None = None, **console: Any) -> str:
    out = io.StringIO()
    preview(run, address=address, console=Console(file=out, width=60, **console))
    return out.getvalue()


def value(text: str, label: str) -> str:
    """What stands behind a label."""
    (found,) = re.findall(rf"^  {re.escape(label)} +(.*)$", text, re.M)
    return str(found)


def write(path: Path, *records: Any) -> str:
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records))
    return str(path)


# ---- samples


def test_the_default_run_shows_the_demo_completions_as_trained():
    text = shown(Run())
    answers = {r["prompt"]: r["completion"] for r in demo_records("train", 2000)}
    samples = re.findall(r"<\|im_start\|>user\n(.*)<\|im_end\|>\n<\|im_start\|>assistant\n«(.*)»", text)
    assert len(samples) == 3
    for prompt, completion in samples:
        assert completion == answers[prompt] + "<|im_end|>"
    assert value(text, "steps") == "125 (1 epoch of 2,000 samples)"
    assert value(text, "name") == "delta"


def test_a_terminal_colours_what_is_trained(base, tmp_path):
    path = write(tmp_path / "x.jsonl", {"prompt": "Is it?", "completion": "It is.\nReally."})
    text = shown(Run(base=base, data=Data(train=(path,))), force_terminal=True, color_system="standard")
    assert "«" not in text
    assert f"assistant\n{GREEN}It is.{PLAIN}\n{GREEN}Really.<|im_end|>{PLAIN}\n" in text  # each line by itself


def test_without_colours_a_terminal_is_told_by_marks(base, tmp_path):
    path = write(tmp_path / "x.jsonl", {"prompt": "Q", "completion": "A"})
    text = shown(Run(base=base, data=Data(train=(path,))), force_terminal=True, no_color=True)
    assert "«A<|im_end|>»" in re.sub(r"\x1b\[\d*m", "", text)


@pytest.mark.parametrize("where", ["tiny", "demo"])
def test_characters_that_span_tokens_are_whole(base, where):
    tokenizer = load_tokenizer(base if where == "tiny" else Base())
    prompt, completion = "Größe 漢字🙂 ", "«é🙂👩‍🚀» \ufffd!"
    ids = [tokenizer(t, add_special_tokens=False)["input_ids"] for t in (prompt, completion)]
    sample = Sample([*ids[0], *ids[1]], [False] * len(ids[0]) + [True] * len(ids[1]))
    parts = list(pieces(tokenizer, sample))
    assert len(parts) < len(sample.tokens)
    assert "".join(text for _, text, target in parts if not target) == prompt
    assert "".join(text for _, text, target in parts if target) == completion
    assert parts[-1][0] == len(sample.tokens)


def test_a_long_sample_loses_its_middle_and_no_character(base, tmp_path):
    path = write(tmp_path / "x.jsonl", {"prompt": "🙂" * 200, "completion": "漢" * 300 + "X"})
    text = shown(Run(base=base, data=Data(train=(path,), chat="never", length=4096)))
    tokens = 4 * 200 + 3 * 300 + 2
    assert f"1: {tokens:,} tokens, 902 of them trained" in text
    hidden = tokens - 2 * EDGE
    head, tail = (
        text.split("Samples")[1].split("\n\n")[0].split(f" … {hidden:,} tokens, {902 - EDGE} of them trained … ")
    )
    assert head.endswith("🙂" * (EDGE // 4))
    assert re.fullmatch(r"«漢{53}X</s>»", tail)  # 158 of the last 160 tokens, so the first of the 53 began before them


def test_records_cannot_send_codes_to_the_terminal(base, tmp_path):
    path = write(tmp_path / "x.jsonl", {"prompt": "\x1b[2J\x07 [red]", "completion": "\x9b"})
    text = shown(Run(base=base, data=Data(train=(path,))))
    assert not {"\x1b", "\x07", "\x9b"} & set(text)
    assert "␛[2J␇ [red]" in text


def test_the_first_token_is_no_target(base, tmp_path):
    path = write(tmp_path / "x.jsonl", {"text": "QXY"})
    text = shown(Run(base=base, data=Data(train=(path,))))
    assert "Q«XY</s>»" in text
    assert value(text, "tokens") == "4, 3 of them trained (75.0%)"


# ---- counts


def test_counts_are_those_counted_by_hand(base, tmp_path):
    # No merge of the tokenizer has a capital letter, so each is a token; </s> closes a sample.
    train = write(
        tmp_path / "train.jsonl",
        {"prompt": "QQQ", "completion": "XY"},  # 6 tokens, 3 trained
        {"prompt": "QQQQ", "completion": "XYXYXYXY"},  # 13 tokens, cut to 8, 4 trained
        {"prompt": "Q", "completion": "X"},  # 3 tokens, 2 trained
        {"prompt": "Q"},  # no completion
        {"prompt": "Q" * 10, "completion": "X"},  # nothing trained is left
        {"prompt": "QQ", "completion": "XXX"},  # 6 tokens, 4 trained
    )
    held = write(tmp_path / "held.jsonl", {"prompt": "QQ", "completion": "X"})
    data = Data(train=(train,), eval=(held,), chat="never", length=8, on_bad_record="skip")
    text = shown(Run(base=base, data=data, train=Train(batch_size=4, epochs=2.5)))
    assert value(text, "steps") == "3 (2.5 epochs of 4 samples)"
    assert value(text, "samples") == "4"
    assert value(text, "tokens") == "23, 13 of them trained (56.5%)"
    assert value(text, "longest") == "8 tokens"
    assert value(text, "truncated") == "1 (data.length 8)"
    assert value(text, "skipped") == "1 malformed, 1 without a trained token"
    assert f"{train}:4: " in text
    assert f"{train}:5: " in text
    # 8, 6, 6 and 3 tokens need four rows of 8, in one pass of 4 x 8 positions.
    assert value(text, "per step") == "4 packed rows, 72% full; passes of each worker: 1, of up to 4 rows"
    assert value(text, "eval").startswith("1 samples, 4 tokens, 2 of them trained")


def test_unpacked_rows_over_two_workers(base, tmp_path):
    path = write(tmp_path / "x.jsonl", *({"prompt": "Q", "completion": "X" * n} for n in (6, 6, 2, 2)))
    run = Run(
        base=base,
        data=Data(train=(path,), chat="never", packing=False, length=64),
        train=Train(batch_size=4, rows_per_pass=1),
        cluster=Cluster(workers=Workers(min=2, max=2)),
    )
    # 8, 8, 4 and 4 tokens; each row is a pass of 8 positions.
    assert value(shown(run), "per step") == "4 rows of one sample, 75% full; passes of each worker: 2, of up to 1 rows"


def test_virtual_tokens_take_their_places(base, tmp_path):
    path = write(tmp_path / "x.jsonl", *({"prompt": "Q", "completion": "X" * n} for n in (6, 6, 2, 2)))
    data = Data(train=(path,), chat="never", packing=False, length=64)
    run = Run(base=base, data=data, train=Train(batch_size=4, rows_per_pass=1), method=Prompt(tokens=4))
    # 12, 12, 8 and 8 tokens in passes of 16, 16, 8 and 8 positions.
    assert value(text := shown(run), "per step").startswith("4 rows of one sample, 83% full; passes of each worker: 4")
    assert value(text, "trainable").startswith("256 in 1 modules")


def test_a_mix_names_each_source(base, tmp_path):
    records = [{"prompt": "Q", "completion": "X"}] * 3
    paths = [write(tmp_path / name, *records) for name in ("a.jsonl", "b.jsonl")]
    data = Data(train=(Source(path=paths[0], weight=2), Source(path=paths[1])))
    text = shown(Run(base=base, data=data))
    assert f"66.7% {paths[0]}, 1.33 times each in an epoch" in text
    assert f"33.3% {paths[1]}, 0.667 times each in an epoch" in text


def test_a_streamed_set(base, tmp_path):
    path = write(tmp_path / "x.jsonl", *({"prompt": f"Q{n}", "completion": "X"} for n in range(50)))
    data = Data(train=(path,), streaming=True)
    text = shown(Run(base=base, data=data, train=Train(steps=7, batch_size=8)))
    assert value(text, "steps") == "7 (train.steps)"
    assert value(text, "samples") == "8 among the first 8 records of the stream"
    with pytest.raises(ConfigError, match=r"train\.steps"):
        shown(Run(base=base, data=data))


# ---- a classification


@pytest.mark.parametrize("arch", ["bert", "llama"])
def test_a_classification_shows_labels_and_counts_its_head(tmp_path, arch):
    folder = tiny.save(tmp_path / arch, arch)
    rows = [{"text": f"the cat {i}", "label": label} for i, label in enumerate(["yes", "no", "\x1bmaybe"])]
    data = write(tmp_path / "texts.jsonl", *rows)
    targets = ("query", "intermediate.dense") if arch == "bert" else ("q_proj",)
    method = Lora(rank=3, targets=targets)
    run = Run(base=Base(id=str(folder)), method=method, task="classification", data=Data(train=(data,), length=32))
    text = shown(run)
    assert value(text, "task") == "classification, pooling auto, 3 labels: ␛maybe, no, yes"
    assert "trained tokens" not in text
    for row in rows:
        around = "<s>{}</s>" if arch == "bert" else "{}"
        label = row["label"].replace("\x1b", "␛")
        count = len(tiny.tokenizer(encoder=arch == "bert")(row["text"])["input_ids"])
        said = rf": {count} tokens, label {label}\n" + re.escape(around.format(row["text"]))
        assert re.search(said, text), text
    assert value(text, "tokens").endswith("one label for each sample")
    theirs = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
    config = LoraConfig(r=3, target_modules=list(targets), task_type="SEQ_CLS")
    trainable, _ = get_peft_model(theirs, config).get_nb_trainable_parameters()
    assert value(text, "trainable").startswith(f"{trainable:,} in ")


# ---- parameters


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gpt_neox", "phi3"])
@pytest.mark.parametrize("targets", ["all-linear", "some"])
def test_parameters_are_those_of_peft(tmp_path, arch, targets):
    some = {"llama": "q_proj", "gpt2": "c_fc", "gpt_neox": "dense_h_to_4h", "phi3": "qkv_proj"}[arch]
    folder = tiny.save(tmp_path / arch, arch)
    wanted = (some,) if targets == "some" else ("all-linear",)
    text = shown(
        Run(base=Base(id=str(folder)), method=Lora(rank=5, targets=wanted), data=Data(train=("demo",), length=2048))
    )
    model = AutoModelForCausalLM.from_pretrained(folder)
    whole = sum(p.numel() for p in model.parameters())
    config = LoraConfig(
        r=5,
        target_modules=[some] if targets == "some" else "all-linear",
        fan_in_fan_out=arch == "gpt2",
        task_type="CAUSAL_LM",
    )
    trainable, _ = get_peft_model(model, config).get_nb_trainable_parameters()
    assert re.match(rf"{trainable:,} in \d+ modules, {trainable / whole:.3%} of the base$", value(text, "trainable"))
    assert value(text, "base size").startswith(f"{whole:,} parameters, ")


@pytest.mark.parametrize("quantize", ["none", "int8", "nf4"])
def test_the_base_is_as_large_as_it_is_when_loaded(quantize):
    base = Base(quantize=quantize)
    report = load_base(base).report
    sizes = measure(Run(base=base), gpu=False)
    assert sizes.base == report.parameters
    # int8's scales are parameters, nf4's state is not
    assert sizes.held == pytest.approx(report.bytes_total + (quantize == "nf4") * report.state_bytes, rel=0.01)


def test_the_delta_file(tmp_path):
    loaded = load_base(Base())
    bank = Bank(loaded.model)
    bank.add(0, Lora())
    save_delta(tmp_path / "d", bank.tensors(0), None, METHODS["lora"].to_peft(Lora(), bank.sites(0), bank.scope))
    size = (tmp_path / "d" / "adapter_model.safetensors").stat().st_size
    assert size == pytest.approx(4 * measure(Run(), gpu=False).trained, rel=0.01)


def test_going_on_from_a_delta_takes_its_size(base, tmp_path):
    bank, knobs = Bank(load_base(base).model), Lora(rank=3, alpha=6.0, targets=("q_proj",))
    bank.add(0, knobs)
    save_delta(tmp_path / "d", bank.tensors(0), None, METHODS["lora"].to_peft(knobs, bank.sites(0), bank.scope))
    start = Train(init_from=str(tmp_path / "d"))
    text = shown(Run(base=base, train=start))
    assert value(text, "trainable").startswith(f"{2 * 3 * (64 + 64):,} in 2 modules")
    assert "rank 3, alpha 6" in value(text, "method")
    with pytest.raises(MethodError, match="rank"):
        shown(Run(base=base, train=start, method=Lora(rank=4)))
    assert "the registry is asked" in shown(Run(base=base, train=Train(init_from="support@champion")))


# ---- the launch


def test_where_it_would_run(base, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    run = Run(base=base, cluster=Cluster(storage="s3://key:secret@store/runs", cpus_per_worker=0.5))
    text = shown(run)
    assert value(text, "workers") == "1, each with 0.5 CPU, no GPU"
    assert value(text, "Ray").startswith(f"a local cluster of this machine: {os.cpu_count()} cores, ")
    assert value(text, "ZeRO stage") == "0 (auto): the base is replicated"
    assert value(text, "storage") == "s3://***@store/runs"
    assert "problem" not in text
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").touch()
    assert value(shown(run), "Ray").startswith("the Ray cluster that was started here")
    assert value(shown(run, "ray://head:10001"), "Ray") == "the Ray cluster at ray://head:10001, which is not contacted"
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert "10.0.0.1:6379, which is not contacted" in shown(run)
    assert "a local cluster" in shown(run, "local")


def test_what_only_the_cluster_knows_is_left_open(base):
    run = Run(base=base, cluster=Cluster(workers=Workers(min=2, max=4)))
    text = shown(run, "ray://head:10001")
    assert value(text, "workers") == "2 to 4, each with 1 CPU, and a GPU where the cluster has any"
    assert value(text, "ZeRO stage").startswith("auto: 0, or 3 where the base fills over half")
    assert text.count("per worker  ") == 2
    sharded = run.model_copy(update={"cluster": Cluster(workers=run.cluster.workers, zero=Zero(stage=3))})
    assert value(shown(sharded, "ray://head:10001"), "ZeRO stage") == "3: the base is sharded"


def test_a_workers_share(base):
    parameters = load_base(base).report.parameters
    for stage, share in ((0, 1), (2, 1), (3, 2)):
        cluster = Cluster(workers=Workers(min=2, max=2), zero=Zero(stage=stage))
        text = shown(Run(base=base, cluster=cluster, method=Lora(rank=1, targets=("q_proj",))), "ray://head:1")
        trained = 2 * (64 + 64)  # fp32 values and gradients, two moments, which stage 2 halves
        state = trained * (12 if stage == 2 else 16)
        said = f"base {parameters * 2 / share / 1024:.1f} KiB, delta with gradient and optimizer {state / 1024:.1f} KiB"
        assert said in value(text, "per worker")


def test_what_this_machine_does_not_have(base, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    many = Run(base=base, cluster=Cluster(workers=Workers(min=500, max=500)))
    problems = re.findall(r"^  problem +(.*)$", shown(many), re.M)
    assert any("500 workers need 500 cores" in p for p in problems)
    assert "500 workers" not in "".join(re.findall(r"problem.*", shown(many, "ray://head:1")))
    gpu = Run(base=base, cluster=Cluster(gpus_per_worker=1))
    assert value(shown(gpu), "problem").startswith("1 workers need a GPU each, this machine has 0")


def test_credentials_are_not_shown(base):
    text = shown(Run(base=base, tracking=Tracking(uri="https://me:secret@mlflow.example", register_as="other")))
    assert value(text, "tracking") == "https://***@mlflow.example, experiment manta"
    assert value(text, "register") == "other@candidate"
    assert "secret" not in text


# ---- errors, and what is left behind


def test_errors_name_what_is_wrong(base, tmp_path):
    with pytest.raises(MethodError, match=r"nearest is 'q_proj'"):
        shown(Run(base=base, method=Lora(targets=("q_prj",))))
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "Q", "completion": "X"}\n{"prompt": 1}\n')
    with pytest.raises(DataError, match=rf"{re.escape(str(bad))}:2: "):
        shown(Run(base=base, data=Data(train=(str(bad),))))
    with pytest.raises(DataError, match=r"did you mean .*bad\.jsonl"):
        shown(Run(base=base, data=Data(train=(str(tmp_path / "bat.jsonl"),))))
    with pytest.raises(BaseModelError, match="no such directory"):
        shown(Run(base=Base(id=str(tmp_path / "none"))))
    with pytest.raises(RegistryError, match=r"tracking\.uri"):
        shown(Run(base=base, tracking=Tracking(uri="ftp://x")))


def test_nothing_is_started_and_only_the_cache_is_written(tmp_path):
    code = (
        "from orchestrator.config import Run; from orchestrator.preview import preview; import sys; preview(Run());"
        "print('loaded', *sorted({'ray', 'deepspeed', 'torch'} & set(sys.modules)))"
    )
    root = Path(__file__).parents[1]
    environment = {**os.environ, "MANTA_HOME": str(tmp_path / "home"), "PYTHONPATH": str(root)}
    (tmp_path / "here").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path / "here", env=environment, check=True
    )
    assert done.stdout.splitlines()[-1] == "loaded torch"
    assert "\x1b" not in done.stdout
    assert not list((tmp_path / "here").iterdir())
    assert [p.relative_to(tmp_path / "home").parts[:2] for p in (tmp_path / "home").glob("*/*")] == [
        ("cache", "samples")
    ]


def test_the_model_takes_no_memory(base):
    before = torch.get_rng_state()
    measure(Run(base=base), gpu=None)
    assert torch.equal(before, torch.get_rng_state())

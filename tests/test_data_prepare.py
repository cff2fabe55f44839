"""Sources to samples: reading, errors with their place, the cache, the split, the order and its cursor."""

import json
import multiprocessing
from collections import Counter
from pathlib import Path

import datasets
import pytest

from orchestrator.config import Data
from orchestrator.data import Renderer, prepare
from orchestrator.data.store import Store
from orchestrator.errors import DataError
from tests.test_data_tokenizer import CHATML, make_tokenizer, write_jsonl, write_parquet


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def pairs(n, mark="q"):
    return [{"prompt": f"{mark}{i} ", "completion": f"a{i}"} for i in range(n)]


def texts(samples, tokenizer):
    return [tokenizer.decode(s.tokens).removesuffix("<|endoftext|>") for s in samples]


def config(*paths, **kw):
    return Data(**{"train": list(paths), "length": 64, **kw})


@pytest.fixture
def jsonl(tmp_path):
    return str(write_jsonl(tmp_path / "a.jsonl", pairs(10)))


def test_every_file_type_gives_the_same_samples(tmp_path, tokenizer):
    records = pairs(5)
    (tmp_path / "a.csv").write_text(
        "prompt,completion\n" + "".join(f"{r['prompt']},{r['completion']}\n" for r in records)
    )
    (tmp_path / "a.tsv").write_text(
        "prompt\tcompletion\n" + "".join(f"{r['prompt']}\t{r['completion']}\n" for r in records)
    )
    (tmp_path / "a.json").write_text(json.dumps(records))
    write_jsonl(tmp_path / "a.jsonl", records)
    write_parquet(tmp_path / "a.parquet", {k: [r[k] for r in records] for k in ("prompt", "completion")})
    expected = [f"q{i} a{i}" for i in range(5)]
    for suffix in ("csv", "tsv", "json", "jsonl", "parquet"):
        train = prepare(config(str(tmp_path / f"a.{suffix}")), tokenizer, seed=0, cache=tmp_path / "c").train
        assert sorted(texts(train.take(5), tokenizer)) == expected


def test_directories_globs_and_columns(tmp_path, tokenizer):
    (tmp_path / "set/deep").mkdir(parents=True)
    write_jsonl(tmp_path / "set/b.jsonl", [{"question": "q0 ", "answer": "a0"}])
    write_jsonl(tmp_path / "set/deep/a.jsonl", [{"question": "q1 ", "answer": "a1"}])
    (tmp_path / "set/readme.txt").write_text("no records")
    columns = {"prompt": "question", "completion": "answer"}
    for path in ("set", "set/**/*.jsonl"):
        source = {"path": str(tmp_path / path), "columns": columns}
        train = prepare(config(source), tokenizer, seed=0, cache=tmp_path / "c").train
        assert sorted(texts(train.take(2), tokenizer)) == ["q0 a0", "q1 a1"]
    wrong = {"path": str(tmp_path / "set"), "columns": {"completion": "anwser"}}
    with pytest.raises(DataError, match=r"b.jsonl:1: has no field 'anwser'.*did you mean 'answer'"):
        prepare(config(wrong), tokenizer, seed=0, cache=tmp_path / "c")


def test_a_hub_set(tmp_path, tokenizer, monkeypatch):
    labels = datasets.ClassLabel(names=["bad", "good"])
    rows = datasets.Dataset.from_dict(
        {"text": ["the fox", "the dog", "?"], "label": [1, 0, -1]},
        features=datasets.Features({"text": datasets.Value("string"), "label": labels}),
    )
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **kw: asked.append((a, kw)) or rows)
    data = config({"path": "org/set", "subset": "en", "split": "dev"}, on_bad_record="skip")
    done = prepare(data, tokenizer, seed=0, cache=tmp_path)
    assert asked == [(("org/set", "en"), {"split": "dev", "streaming": False})]
    assert sorted(texts(done.train.take(2), tokenizer)) == ["the dog\nbad", "the fox\ngood"]
    assert done.report.reasons == ["org/set/en[dev]:3: label: is not given"]


def test_what_is_not_there(tmp_path, tokenizer, jsonl):
    for path, message in (
        (str(tmp_path / "b.jsonl"), r"no file or directory .*did you mean '.*a\.jsonl'"),
        (str(tmp_path / "*.csv"), "no file there ends in"),
        ("nobody/nothing", "neither a local path nor loads from the hub"),
        (__file__, "cannot read .py"),
    ):
        with pytest.raises(DataError, match=message):
            prepare(config(path), tokenizer, seed=0, cache=tmp_path / "c")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(DataError, match=r"a\.parquet: is not a Parquet file"):
        prepare(config(str(tmp_path / "a.parquet")), tokenizer, seed=0, cache=tmp_path / "c")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match="holds no records"):
        prepare(config(str(tmp_path / "empty.jsonl")), tokenizer, seed=0, cache=tmp_path / "c")


BAD = [
    ("a.jsonl", '{"text": "a"}\n\n{"text": \n{"text": "b"}\n', 3, "is not JSON: Expecting value"),
    ("a.jsonl", '{"text": "a"}\n[1]\n', 2, "must be a JSON object, is list"),
    ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', 2, "is not UTF-8"),
    ("a.jsonl", '{"text": "a"}\n{"txt": "b"}\n', 2, "has no field 'text'"),
    ("a.jsonl", '{"text": "a"}\n{"text": "\\ud800"}\n', 2, "surrogate"),
    ("a.csv", 'text,x\n"two\nlines",1\nb\n', 4, "has 1 fields, the header names 2"),
    ("a.csv", "prompt,completion\na,b\nc,\n", 3, "completion: is empty"),
    ("a.csv", b"text,x\na,1\n\xff,1\n", 3, "is not UTF-8"),
    ("a.parquet", {"text": ["a", None, "b"]}, 2, "text: must be text, is null"),
]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(("name", "content", "line", "problem"), BAD)
def test_a_bad_record_has_a_place(tmp_path, tokenizer, name, content, line, problem, streaming):
    path = tmp_path / name
    if isinstance(content, dict):
        write_parquet(path, content)
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    data = config(str(path), streaming=streaming, shuffle_buffer=1)
    with pytest.raises(DataError) as caught:
        prepare(data, tokenizer, seed=0, cache=tmp_path / "c").train.take(5)
    assert str(caught.value).startswith(f"{path}:{line}: ")
    assert problem in str(caught.value)
    done = prepare(data.model_copy(update={"on_bad_record": "skip"}), tokenizer, seed=0, cache=tmp_path / "c")
    done.train.take(1 if streaming else 2)
    done.train.take(1)
    assert done.report.skipped == 1
    assert done.report.reasons[0].startswith(f"{path}:{line}: ")


def test_processes_tokenize_alike_and_fail_alike(tmp_path, tokenizer, jsonl):
    one = prepare(config(jsonl), tokenizer, seed=0, cache=tmp_path / "1")
    two = prepare(config(jsonl, workers=2), tokenizer, seed=0, cache=tmp_path / "2")
    assert one.train.take(30) == two.train.take(30)
    assert one.digest == two.digest
    bad = write_jsonl(tmp_path / "bad.jsonl", [*pairs(8), {"prompt": "a"}])
    with pytest.raises(DataError, match=r"bad\.jsonl:9: has no field 'completion'"):
        prepare(config(str(bad), workers=2), tokenizer, seed=0, cache=tmp_path / "3")
    assert not [p for p in (tmp_path / "3").iterdir() if p.is_dir()]


def test_truncation_is_counted(tmp_path, tokenizer):
    records = [
        {"prompt": "x", "completion": "y"},
        {"prompt": "x", "completion": "y1 " * 50},
        {"prompt": "y1 " * 50, "completion": "x"},
    ]
    path = str(write_jsonl(tmp_path / "a.jsonl", records))
    done = prepare(config(path, length=16), tokenizer, seed=0, cache=tmp_path / "c")
    report = done.report.as_dict()
    assert {k: report[k] for k in ("records", "samples", "truncated", "dropped", "skipped")} == {
        "records": 3,
        "samples": 2,
        "truncated": 1,
        "dropped": 1,
        "skipped": 0,
    }
    assert report["reasons"] == [f"{path}:3: none of its 2 target tokens is within the first 16 of 152 tokens"]
    samples = done.train.take(2)
    assert report["tokens"] == sum(len(s.tokens) for s in samples) == 3 + 16
    assert report["trained_tokens"] == sum(s.targets for s in samples) == 2 + 15


def test_the_second_time_nothing_is_tokenized(tmp_path, tokenizer, jsonl, monkeypatch):
    first = prepare(config(jsonl), tokenizer, seed=0, cache=tmp_path / "c")
    monkeypatch.setattr(Renderer, "__call__", lambda *a: pytest.fail("tokenized again"))
    copy = tmp_path / "elsewhere" / "b.jsonl"
    copy.parent.mkdir()
    copy.write_bytes(Path(jsonl).read_bytes())
    second = prepare(config(str(copy), packing=False), make_tokenizer(), seed=0, cache=tmp_path / "c")
    assert (first.report.cached, second.report.cached) == (False, True)
    assert first.train.take(10) == second.train.take(10)
    assert first.digest == second.digest


@pytest.mark.parametrize("change", ["content", "length", "loss_on", "template", "layout"])
def test_what_samples_depend_on_is_in_the_key(tmp_path, tokenizer, jsonl, change):
    prepare(config(jsonl), tokenizer, seed=0, cache=tmp_path / "c")
    data = config(jsonl)
    if change == "content":
        write_jsonl(Path(jsonl), pairs(9))
    elif change == "template":
        tokenizer = make_tokenizer(CHATML)
    elif change == "layout":
        data = config({"path": jsonl, "format": "prompt"})
    else:
        data = config(jsonl, **{"length": 32} if change == "length" else {"loss_on": "all"})
    assert not prepare(data, tokenizer, seed=0, cache=tmp_path / "c").report.cached


def _rank(path, cache, queue):
    done = prepare(config(path), make_tokenizer(), seed=0, cache=cache)
    queue.put((done.report.cached, [s.tokens for s in done.train.take(10)]))


def test_ranks_at_once_tokenize_once(tmp_path, jsonl):
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    ranks = [context.Process(target=_rank, args=(jsonl, tmp_path / "c", queue)) for _ in range(3)]
    for rank in ranks:
        rank.start()
    results = [queue.get(timeout=120) for _ in ranks]
    for rank in ranks:
        rank.join()
    assert sorted(cached for cached, _ in results) == [False, True, True]
    assert results[0][1] == results[1][1] == results[2][1]


def test_a_damaged_store_is_named(tmp_path, tokenizer, jsonl):
    prepare(config(jsonl), tokenizer, seed=0, cache=tmp_path / "c")
    store = next(p for p in (tmp_path / "c").iterdir() if p.is_dir())
    (store / "trained.u8").write_bytes(b"\0")
    with pytest.raises(DataError, match="is damaged; remove it"):
        prepare(config(jsonl), tokenizer, seed=0, cache=tmp_path / "c")


def test_a_full_disk_leaves_nothing_behind(tmp_path, tokenizer, jsonl, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("orchestrator.data.store._write_arrays", full)
    with pytest.raises(DataError, match=r"cannot write the samples .*No space left"):
        prepare(config(jsonl), tokenizer, seed=0, cache=tmp_path / "c")
    assert not [p for p in (tmp_path / "c").iterdir() if p.is_dir()]


def test_epochs_hold_every_sample_once_in_an_order_by_seed(tmp_path, tokenizer, jsonl):
    def epochs(seed):
        train = prepare(config(jsonl), tokenizer, seed=seed, cache=tmp_path / "c").train
        assert train.size == len(train) == 10
        return [texts(train.take(10), tokenizer) for _ in range(3)]

    everything = sorted(f"q{i} a{i}" for i in range(10))
    assert [sorted(e) for e in epochs(0)] == [everything] * 3
    assert epochs(0) == epochs(0)
    assert len({tuple(e) for e in [*epochs(0), *epochs(1)]}) == 6


def test_the_mix_follows_the_weights(tmp_path, tokenizer):
    a = write_jsonl(tmp_path / "a.jsonl", pairs(20, "a"))
    b = write_jsonl(tmp_path / "b.jsonl", pairs(80, "b"))
    data = config({"path": str(a), "weight": 3}, {"path": str(b), "weight": 1})
    done = prepare(data, tokenizer, seed=0, cache=tmp_path / "c")
    epoch = texts(done.train.take(100), tokenizer)
    count = Counter(t[0] for t in epoch)
    assert count == {"a": 75, "b": 25}
    assert len({t for t in epoch if t[0] == "b"}) == 25
    assert set(Counter(t for t in epoch if t[0] == "a").values()) == {3, 4}  # as even as 75 draws from 20 can be
    assert [s["share"] for s in done.report.sources] == [0.75, 0.25]
    assert [s["passes"] for s in done.report.sources] == [75 / 20, 25 / 80]
    rest = texts(done.train.take(300), tokenizer)
    assert set(Counter(t for t in epoch + rest if t[0] == "b").values()) == {1, 2}  # 100 draws from 80


def test_keys_are_the_samples_own(tmp_path, tokenizer, jsonl):
    train = prepare(config(jsonl), tokenizer, seed=0, cache=tmp_path / "c").train
    keys = {}
    for sample, text in zip(samples := train.take(20), texts(samples, tokenizer), strict=True):
        assert keys.setdefault(sample.key, text) == text
    assert sorted(keys) == list(range(10))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("before", [0, 1, 7, 13, 29, 40])
def test_the_cursor_resumes_exactly(tmp_path, tokenizer, jsonl, streaming, before):
    other = write_parquet(
        tmp_path / "b.parquet", {"prompt": [f"b{i} " for i in range(17)], "completion": [f"a{i}" for i in range(17)]}
    )
    folder = tmp_path / "many"
    folder.mkdir()
    for i in range(3):
        write_jsonl(folder / f"{i}.jsonl", pairs(4, f"m{i}-"))
    data = config(jsonl, {"path": str(other), "weight": 2}, str(folder), streaming=streaming, shuffle_buffer=5)

    def fresh():
        return prepare(data, tokenizer, seed=3, cache=tmp_path / "c").train

    train = fresh()
    train.take(before)
    state = json.loads(json.dumps(train.state()))
    expected = train.take(60)
    resumed = fresh()
    resumed.load_state(state)
    assert resumed.take(60) == expected
    assert resumed.state() == train.state()
    again = fresh()
    assert again.take(before + 60)[before:] == expected


def test_a_cursor_of_other_data_is_refused(tmp_path, tokenizer, jsonl):
    state = prepare(config(jsonl), tokenizer, seed=0, cache=tmp_path / "c").train.state()
    for data, seed, what in ((config(jsonl), 1, "seed"), (config(jsonl, length=32, loss_on="all"), 0, "digest")):
        with pytest.raises(DataError, match=f"its {what} is"):
            prepare(data, tokenizer, seed=seed, cache=tmp_path / "c").train.load_state(state)


def test_streaming_gives_each_record_once_per_epoch_and_keeps_no_store(tmp_path, tokenizer):
    path = str(write_jsonl(tmp_path / "a.jsonl", pairs(23)))
    done = prepare(config(path, streaming=True, shuffle_buffer=6), tokenizer, seed=0, cache=tmp_path / "c")
    assert done.train.size is None
    first, second = texts(done.train.take(23), tokenizer), texts(done.train.take(23), tokenizer)
    assert sorted(first) == sorted(second) == sorted(f"q{i} a{i}" for i in range(23))
    assert first != second
    assert set(first[:6]) == {f"q{i} a{i}" for i in range(6)}  # no record comes before its window
    assert done.report.samples == 46
    assert not (tmp_path / "c").exists()


def test_streaming_mixes_by_weight(tmp_path, tokenizer):
    a = write_jsonl(tmp_path / "a.jsonl", pairs(20, "a"))
    b = write_jsonl(tmp_path / "b.jsonl", pairs(20, "b"))
    data = config({"path": str(a), "weight": 3}, str(b), streaming=True, shuffle_buffer=4)
    taken = texts(prepare(data, tokenizer, seed=0).train.take(2000), tokenizer)
    assert abs(sum(t[0] == "a" for t in taken) / 2000 - 0.75) < 0.03  # three standard deviations


@pytest.mark.parametrize("before", [0, 3, 8, 11, 25])
def test_a_streamed_hub_set_resumes_exactly(tmp_path, tokenizer, monkeypatch, before):
    columns = {"prompt": [f"q{i} " for i in range(11)], "completion": [f"a{i}" for i in range(11)]}
    monkeypatch.setattr(
        datasets,
        "load_dataset",
        lambda *a, **kw: datasets.Dataset.from_dict(columns).to_iterable_dataset(num_shards=3),
    )
    data = config("org/set", streaming=True, shuffle_buffer=4)

    def fresh():
        return prepare(data, tokenizer, seed=0, cache=tmp_path).train

    whole = texts(fresh().take(before + 30), tokenizer)
    assert sorted(whole[:11]) == sorted(f"q{i} a{i}" for i in range(11))
    train = fresh()
    train.take(before)
    resumed = fresh()
    resumed.load_state(json.loads(json.dumps(train.state())))
    assert texts(resumed.take(30), tokenizer) == whole[before:]


def test_a_stream_without_samples_ends(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "a", "completion": ""}] * 3)
    train = prepare(config(str(path), streaming=True, on_bad_record="skip"), tokenizer, seed=0).train
    with pytest.raises(DataError, match=r"no record makes a sample: .*a\.jsonl:1: completion: is empty"):
        train.take(1)


def test_the_split_is_drawn_by_seed(tmp_path, tokenizer, jsonl):
    def split(seed):
        done = prepare(config(jsonl, eval_fraction=0.3), tokenizer, seed=seed, cache=tmp_path / "c")
        return set(texts(done.train.take(7), tokenizer)), texts(list(done.eval), tokenizer), done

    train, held, done = split(0)
    assert train | set(held) == {f"q{i} a{i}" for i in range(10)}
    assert (len(train), len(held), done.report.samples, done.report.eval.samples) == (7, 3, 7, 3)
    assert texts(done.eval[1:], tokenizer) == held[1:]
    assert split(0)[1] == held
    assert any(split(s)[1] != held for s in range(1, 5))


def test_held_out_sources(tmp_path, tokenizer, jsonl):
    held = write_jsonl(tmp_path / "held.jsonl", pairs(3, "h"))
    for streaming in (False, True):
        done = prepare(config(jsonl, eval=[str(held)], streaming=streaming), tokenizer, seed=0, cache=tmp_path / "c")
        assert texts(list(done.eval), tokenizer) == ["h0 a0", "h1 a1", "h2 a2"]
    assert prepare(config(jsonl), tokenizer, seed=0, cache=tmp_path / "c").eval is None
    for wrong, message in (({"eval": [str(held)]}, "exclude each other"), ({"streaming": True}, "needs the whole set")):
        with pytest.raises(DataError, match=message):
            prepare(config(jsonl, eval_fraction=0.5, **wrong), tokenizer, seed=0, cache=tmp_path / "c")


def test_a_store_is_mapped_not_read(tmp_path, tokenizer, jsonl):
    prepare(config(jsonl), tokenizer, seed=0, cache=tmp_path / "c")
    store = Store(next(p for p in (tmp_path / "c").iterdir() if p.is_dir()), [jsonl])
    assert type(store._tokens).__name__ == "memmap"
    assert len(store) == 10
    assert tokenizer.decode(store.sample(4, 9).tokens) == "q4 a4<|endoftext|>"
    assert store.sample(4, 9).key == 9

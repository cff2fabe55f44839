"""``manta eval``: its figures are those of libraries and of transformers itself; mistakes are said early."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import sacrebleu
import torch
from peft import PeftModel
from sklearn.metrics import accuracy_score, f1_score
from transformers import AutoModelForCausalLM, AutoTokenizer

from orchestrator.config import Base
from orchestrator.config.load import load_evaluation
from orchestrator.delta import load_delta
from orchestrator.errors import ConfigError, DataError, WrongBaseError
from orchestrator.evaluate import base_of
from orchestrator.evaluate_set import read_set
from orchestrator.scores import METRICS, answer_scores, better
from tests import tiny
from tests.classify_kit import ANIMALS, RECORDS, pooled, transformer
from tests.eval_kit import ASKED, Made, run, write
from tests.launch_kit import small, train_here, weights


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MANTA_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("made"))


# ---- metrics


def test_bleu_is_the_published_figure_and_takes_any_number_of_references() -> None:
    # The example in sacrebleu's documentation: BLEU = 48.53.
    said = ["The dog bit the man.", "It wasn't surprising.", "The man had just bitten him."]
    one = ["The dog bit the man.", "It was not unexpected.", "The man bit him first."]
    two = ["The dog had bit the man.", "No one was surprised.", "The man had bitten the dog."]
    found = answer_scores(["bleu"], said, list(zip(one, two, strict=True)))
    assert found == {"bleu": pytest.approx(48.53, abs=0.005)}
    ragged = answer_scores(["bleu"], said, [[one[0], two[0]], [one[1]], [one[2], two[2]]])
    expected = sacrebleu.corpus_bleu(said, [one, [two[0], None, two[2]]]).score
    assert ragged["bleu"] == pytest.approx(expected)


def test_rouge_and_exact_match_worked_out_by_hand() -> None:
    said, right = "The quick brown dog jumps on the log.", "The quick brown fox jumps over the lazy dog"
    found = answer_scores(list(METRICS), [said, " no "], [["nothing alike", right], ["yes", "no"]])
    # 6 of 8 words are among the 9; 2 of 7 pairs among the 8; the longest common sequence is of 5 words
    assert found["rouge1"] == pytest.approx((2 * 6 / (8 + 9) + 1) / 2)
    assert found["rouge2"] == pytest.approx((2 * 2 / (7 + 8) + 0) / 2)
    assert found["rougeL"] == pytest.approx((2 * 5 / (8 + 9) + 1) / 2)
    assert found["exact_match"] == 0.5


def test_which_way_is_better_is_known() -> None:
    assert better("bleu", 2, 1)
    assert better("perplexity", 1, 2)
    assert not better("loss", 2, 1)
    assert not any(better(name, 1.0, 1.0) for name in METRICS)
    assert better("loss", 1.0, math.nan)
    assert not better("loss", math.nan, 1.0)
    assert not better("loss", math.nan, math.nan)


# ---- a causal language model


def theirs(base: Path, delta: Path | None = None) -> Any:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return (PeftModel.from_pretrained(model, delta) if delta else model).eval()


def their_loss(model: Any, tokenizer: Any) -> tuple[float, int]:
    """Mean over all target tokens of transformers' own loss, one reference at a time; and how many tokens."""
    total, count = 0.0, 0
    for record in ASKED:
        for text in record.get("references", [record.get("completion")]):
            turns = [{"role": "user", "content": record["prompt"]}, {"role": "assistant", "content": text}]
            out = tokenizer.apply_chat_template(turns, return_dict=True, return_assistant_tokens_mask=True)
            ids, mask = (torch.tensor([out[key]]) for key in ("input_ids", "assistant_masks"))
            with torch.no_grad():
                loss = model(input_ids=ids, labels=ids.masked_fill(mask == 0, -100)).loss
            total, count = total + float(loss) * int(mask.sum()), count + int(mask.sum())
    return total / count, count


@pytest.mark.parametrize("who", ["base", "delta"])
def test_perplexity_and_answers_are_those_of_transformers(who: str, made: Made) -> None:
    tokenizer = AutoTokenizer.from_pretrained(made.base)
    if who == "base":
        found = run("base", made.asked, f"base={made.base}", "base.quantize=none", max_tokens=6)
        model = theirs(made.base)
    else:
        found = run(made.talker, made.asked, max_tokens=6)
        model = theirs(made.base, made.talker)
    assert found.identity.recipe == "none/fp32"
    expected, count = their_loss(model, tokenizer)
    assert count == 25
    assert found.metrics["loss"] == pytest.approx(expected, rel=1e-5)
    assert found.metrics["perplexity"] == pytest.approx(math.exp(expected), rel=1e-4)
    for record, said in zip(ASKED, found.predictions, strict=True):
        turns = [{"role": "user", "content": record["prompt"]}]
        ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True, return_tensors="pt")
        out = model.generate(**ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
        answer = tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
        assert said["prediction"] == answer
        assert said["references"] == record.get("references", [record.get("completion")])
    answers = [said["prediction"] for said in found.predictions]
    assert (
        found.metrics.items()
        >= answer_scores(["bleu", "rougeL"], answers, [s["references"] for s in found.predictions]).items()
    )


def test_a_delta_differs_from_its_base_and_keeps_to_the_precision_asked_for(made: Made) -> None:
    plain = run("base", made.asked, f"base={made.base}", "base.quantize=none", metrics=["loss"])
    tuned = run(made.talker, made.asked, metrics=["loss"])
    served = run(made.talker, made.asked, "base.quantize=nf4", metrics=["loss"])
    assert len({r.metrics["loss"] for r in (plain, tuned, served)}) == 3
    assert served.identity.recipe == "nf4-double/fp32"
    assert plain.data.digest == tuned.data.digest


def test_the_base_is_as_it_was_in_training_unless_asked_otherwise(made: Made) -> None:
    delta = load_delta(made.talker)
    assert delta.manifest
    for recipe, quantize, precision in (
        ("nf4-double/bf16, layers 1 unquantized", "nf4", "bf16"),
        ("int8/fp32", "int8", "fp32"),
        ("unknown", "none", "auto"),
    ):
        told = delta.manifest.base.model_copy(update={"recipe": recipe})
        other = type(delta)(**{**vars(delta), "manifest": delta.manifest.model_copy(update={"base": told})})
        assert base_of(Base(), other) == Base(id=str(made.base), quantize=quantize, precision=precision)
        assert base_of(Base(quantize="nf4", precision="fp32"), other).quantize == "nf4"


def test_another_precision_is_said(made: Made, capfd: pytest.CaptureFixture[str]) -> None:
    run(made.talker, made.asked, "base.quantize=int8", metrics=["loss"], limit=1)
    assert "trained on a base held as none/fp32 and now meets it as int8/fp32" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("method", "quantize"),
    [
        ("{type: prompt, tokens: 3}", "nf4"),
        ("{type: prefix, tokens: 2}", "none"),
        ("{type: last_layers, layers: 1}", "nf4"),
        ("{type: full}", "none"),
        ("{peft: {type: LOHA, r: 2}}", "none"),
    ],
)
def test_every_kind_of_delta_has_the_loss_that_its_training_told(
    method: str, quantize: str, made: Made, tmp_path: Path
) -> None:
    asked = write(tmp_path / "plain.jsonl", [r for r in ASKED if "completion" in r])
    more = (f"data.eval={asked}", "train.steps=2", "train.eval_every=2", f"base.quantize={quantize}")
    heard = train_here(small(f"base={made.base}", f"data={asked}", f"method={method}", *more), tmp_path / "run")
    assert heard.latest
    found = run(heard.latest / "delta" / "delta", asked, max_tokens=3)
    assert found.identity.recipe == load_delta(heard.latest / "delta" / "delta").manifest.base.recipe  # type: ignore[union-attr]
    assert found.metrics["loss"] == pytest.approx(heard.of("eval", "eval_loss")[-1], rel=1e-5)


# ---- a classification


def test_predictions_are_those_of_transformers_and_metrics_those_of_sklearn(made: Made) -> None:
    found = run(made.sorter, made.texts)
    head = weights(made.sorter)
    bert = transformer(made.encoder)
    h_NH = torch.cat([pooled(bert, record["text"], "mean", encoder=True) for record in RECORDS])
    logits_NC = torch.nn.functional.linear(
        h_NH, head["base_model.model.classifier.weight"], head["base_model.model.classifier.bias"]
    )
    expected = [ANIMALS[at] for at in logits_NC.argmax(1).tolist()]
    assert set(expected) == set(ANIMALS)
    right = [record["label"] for record in RECORDS]
    assert [said["prediction"] for said in found.predictions] == expected
    assert [(said["text"], said["label"]) for said in found.predictions] == [(r["text"], r["label"]) for r in RECORDS]
    assert found.metrics["accuracy"] == pytest.approx(accuracy_score(right, expected))
    assert found.metrics["f1"] == pytest.approx(f1_score(right, expected, average="macro"))
    loss = torch.nn.functional.cross_entropy(logits_NC, torch.tensor([ANIMALS.index(r) for r in right]))
    assert found.metrics["loss"] == pytest.approx(float(loss), rel=1e-4)


# ---- mistakes


def test_mistakes_are_said_before_the_base_is_loaded(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("the base was loaded")

    monkeypatch.setattr("orchestrator.evaluate.load_base", never)
    empty = write(tmp_path / "empty.jsonl", [])
    text = write(tmp_path / "text.jsonl", [{"text": "the cat sat"}])
    strange = write(tmp_path / "strange.jsonl", [RECORDS[0], {"text": "the cow", "label": "cwo"}])
    odd = write(tmp_path / "odd.jsonl", [{"prompt": "a", "references": []}])
    other = tiny.save(tmp_path / "other", seed=1)
    for ref, data, metrics, more, kind, said in (
        (made.talker, made.asked, ["rougel"], (), ConfigError, "did you mean 'rougeL'.*causal_lm has exact_match"),
        (made.talker, made.asked, ["accuracy"], (), ConfigError, "does not fit the task causal_lm; causal_lm has"),
        (made.sorter, made.texts, ["bleu"], (), ConfigError, "does not fit the task classification.*accuracy, f1, mcc"),
        (made.talker, empty, [], (), DataError, "holds no records"),
        (made.talker, text, ["bleu"], (), DataError, "text.jsonl:1: has no reference"),
        (made.talker, odd, [], (), DataError, "odd.jsonl:1: references: must be a list"),
        (made.sorter, made.asked, [], (), DataError, "asked.jsonl:1: the task classification needs"),
        (made.sorter, strange, [], (), DataError, "strange.jsonl:2: label: 'cwo' is not among.*'cow'"),
        (made.talker, made.asked, [], (f"base={other}",), WrongBaseError, "was made for"),
    ):
        with pytest.raises(kind, match=f"(?s){said}"):
            run(ref, data, *more, metrics=metrics)


def test_plain_text_has_a_perplexity_alone(made: Made, tmp_path: Path) -> None:
    text = write(tmp_path / "text.jsonl", [{"text": "the cat sat on the mat"}])
    found = run("base", text, f"base={made.base}", "base.quantize=none")
    assert list(found.metrics) == ["perplexity", "loss"]
    ids = torch.tensor([AutoTokenizer.from_pretrained(made.base)("the cat sat on the mat</s>")["input_ids"]])
    with torch.no_grad():
        assert found.metrics["loss"] == pytest.approx(
            float(theirs(made.base)(input_ids=ids, labels=ids).loss), rel=1e-5
        )


def test_a_prompt_that_is_too_long_is_named(made: Made) -> None:
    with pytest.raises(DataError, match=r"asked.jsonl:2: the prompt has \d+ tokens; with max_tokens=230"):
        run("base", made.asked, f"base={made.base}", metrics=["exact_match"], max_tokens=230, length=256)


def test_a_missing_library_is_named_with_what_does_without(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.scores.find_spec", lambda name: None)
    with pytest.raises(
        ConfigError, match=r"bleu, rougeL needs sacrebleu and rouge_score: pip install 'manta-ray\[eval\]'"
    ):
        run(made.talker, made.asked)
    assert run(made.talker, made.asked, metrics=["loss"]).metrics


def test_the_digest_is_of_the_records_that_are_used(made: Made, tmp_path: Path) -> None:
    def digest(path: Path, limit: int | None = None) -> str:
        return read_set(load_evaluation(["delta=x", f"data={path}"]).data, limit).digest

    array = tmp_path / "asked.json"
    array.write_text(json.dumps(ASKED))
    assert digest(array) == digest(made.asked) != digest(made.asked, 2)
    assert digest(write(tmp_path / "two.jsonl", ASKED[:2])) == digest(made.asked, 2)

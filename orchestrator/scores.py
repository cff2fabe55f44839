"""The metrics of an evaluation: which there are, what each needs, which way is better. Computed by known libraries."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.util import find_spec
from typing import Literal

from orchestrator.errors import ConfigError

Needs = Literal["answers", "loss", "labels"]


@dataclass(frozen=True)
class Metric:
    """One metric."""

    task: str
    """Task of the deltas that it fits; empty for all."""
    needs: Needs
    """What it is computed from: generated answers, the loss of the targets, or predicted labels."""
    higher: bool
    """Whether a higher value is better."""
    library: str | None = None
    """A library of the extra ``eval`` that computes it."""


METRICS: dict[str, Metric] = {
    "exact_match": Metric("causal_lm", "answers", higher=True),
    "bleu": Metric("causal_lm", "answers", higher=True, library="sacrebleu"),
    "rouge1": Metric("causal_lm", "answers", higher=True, library="rouge_score"),
    "rouge2": Metric("causal_lm", "answers", higher=True, library="rouge_score"),
    "rougeL": Metric("causal_lm", "answers", higher=True, library="rouge_score"),
    "perplexity": Metric("causal_lm", "loss", higher=False),
    "accuracy": Metric("classification", "labels", higher=True),
    "f1": Metric("classification", "labels", higher=True),
    "mcc": Metric("classification", "labels", higher=True),
    "loss": Metric("", "loss", higher=False),
}


def fitting(task: str, *, references: bool = True) -> tuple[str, ...]:
    """Metrics of a task; without ``references`` those that need no answers."""
    return tuple(n for n, m in METRICS.items() if m.task in ("", task) and (references or m.needs != "answers"))


def check_metrics(names: Sequence[str], task: str = "") -> None:
    """Refuse what is no metric, does not fit the task (where one is given), or lacks its library.

    Raises:
        ConfigError: names the nearest metric and those that fit.
    """
    fit = fitting(task) if task else tuple(METRICS)
    for name in names:
        if name not in METRICS:
            near = get_close_matches(name, fit, n=1) or get_close_matches(name.lower(), fit, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ConfigError(f"there is no metric {name!r}; {hint}{_fits(fit, task)}")
        if name not in fit:
            raise ConfigError(f"the metric {name!r} does not fit the task {task}; {_fits(fit, task)}")
    missing = {str(METRICS[n].library): n for n in names if not _installed(METRICS[n].library)}
    if missing:
        free = ", ".join(n for n in fit if METRICS[n].library is None)
        raise ConfigError(
            f"{', '.join(missing.values())} needs {' and '.join(missing)}: pip install 'manta-ray[eval]'; "
            f"without it, name the metrics (--metric): {free}"
        )


def _fits(fit: Sequence[str], task: str) -> str:
    return f"{f'{task} has' if task else 'there are'} {', '.join(fit)}"


def _installed(library: str | None) -> bool:
    return library is None or find_spec(library) is not None


def answer_scores(
    names: Sequence[str], answers: Sequence[str], references: Sequence[Sequence[str]]
) -> dict[str, float]:
    """Scores of generated answers, each beside one or more references; blanks around a text do not count.

    ``exact_match``: share of answers that equal a reference. ``bleu``: of the corpus, 0 to 100, sacrebleu's defaults.
    ``rouge1``, ``rouge2``, ``rougeL``: F-measure of the nearest reference, 0 to 1, mean over the records, without
    stemming; the library sees Latin letters and digits only.
    """
    said = [answer.strip() for answer in answers]
    wanted = [[text.strip() for text in texts] for texts in references]
    found: dict[str, float] = {}
    if "exact_match" in names:
        found["exact_match"] = sum(a in texts for a, texts in zip(said, wanted, strict=True)) / len(said)
    if "bleu" in names:
        found["bleu"] = _bleu(said, wanted)
    if rouges := [n for n in names if n.startswith("rouge")]:
        from rouge_score.rouge_scorer import RougeScorer  # the extra `eval`, as sacrebleu

        scorer = RougeScorer(rouges, use_stemmer=False)
        each = [scorer.score_multi(texts, answer) for answer, texts in zip(said, wanted, strict=True)]
        found |= {n: math.fsum(one[n].fmeasure for one in each) / len(each) for n in rouges}
    return found


def _bleu(answers: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    import sacrebleu

    width = max(map(len, references))
    columns = [[texts[i] if i < len(texts) else None for texts in references] for i in range(width)]
    return float(sacrebleu.corpus_bleu(answers, columns).score)


def perplexity(loss: float) -> float:
    """``exp`` of the mean loss of a token; infinite where that is beyond a double."""
    return math.exp(loss) if loss < 709 else math.inf


def better(name: str, new: float, old: float) -> bool:
    """Whether ``new`` is strictly better; a value that is no number never is, and any number is better than it."""
    if math.isnan(new) or math.isnan(old):
        return math.isnan(old) and not math.isnan(new)
    return new > old if METRICS[name].higher else new < old

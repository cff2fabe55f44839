"""Where the training records come from and how they become samples."""

from typing import Literal

from pydantic import Field, model_validator

from orchestrator.config.strict import Strict

Format = Literal["auto", "prompt", "messages", "alpaca", "sharegpt", "text", "label"]


class Source(Strict):
    """One set of records: a local file (JSONL, CSV, Parquet), a directory or glob of them, or a hub name."""

    path: str
    """File, directory, glob, hub data set name, or ``demo`` for the generated demo task."""
    weight: float = Field(default=1.0, gt=0)
    """Share of this source in the mix, relative to the others'."""
    format: Format = "auto"
    """Record layout; ``auto`` reads it off the first record's keys."""
    split: str = "train"
    """Split of a hub data set."""
    subset: str | None = None
    """Configuration of a hub data set."""
    columns: dict[str, str] = {}
    """Renames: our field name to the record's, such as ``{prompt: question, completion: answer}``."""

    @model_validator(mode="before")
    @classmethod
    def _short(cls, value: object) -> object:
        return {"path": value} if isinstance(value, str) else value


class Data(Strict):
    """Records in, samples out."""

    train: tuple[Source, ...] = Field(default=(Source(path="demo"),), min_length=1)
    """Training sources."""
    eval: tuple[Source, ...] = ()
    """Held-out sources. Exclusive with ``eval_fraction``."""
    eval_fraction: float = Field(default=0.0, ge=0, lt=1)
    """Share of the training records to hold out, drawn by seed."""
    length: int = Field(default=1024, ge=8)
    """Tokens per packed row; longer samples are truncated, counted and reported."""
    packing: bool = True
    """Put several samples in a row. They never see each other."""
    loss_on: Literal["completions", "last", "flagged", "all"] = "completions"
    """Trained tokens: every completion / assistant turn, the last one, messages with ``train: true``, or all."""
    chat: Literal["auto", "always", "never"] = "auto"
    """Render prompt + completion records through the chat template: always, never, or where there is a template."""
    tools_key: str = "tools"
    """Key that holds the tools of a ``messages`` record."""
    on_bad_record: Literal["fail", "skip"] = "fail"
    """A malformed record ends the run with file and line, or is skipped and counted."""
    streaming: bool = False
    """Read while training, for sets larger than memory. Needs ``train.steps``."""
    shuffle_buffer: int = Field(default=10_000, ge=1)
    """Records in the shuffle window of a streamed set."""
    workers: int = Field(default=1, ge=1)
    """Processes that tokenize."""

    @model_validator(mode="before")
    @classmethod
    def _short(cls, value: object) -> object:
        if isinstance(value, str):
            return {"train": [value]}
        if isinstance(value, dict):
            return {k: [v] if k in ("train", "eval") and isinstance(v, str | dict) else v for k, v in value.items()}
        return value

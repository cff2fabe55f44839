"""Records out of files and hub data sets, one at a time, each knowing where it stands.

A reader yields in a fixed order, can say where it is and start there again. It never raises for a bad record:
the record carries its problem, and the caller's policy decides.
"""

import csv
import glob
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Protocol

from orchestrator.config import Source
from orchestrator.errors import DataError

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
"""File types that are read, told apart by the file's suffix."""
DEMO_RECORDS = {"train": 2000, "test": 200}
"""Records of the generated demo task, by split."""
_HUB_NAME = re.compile(r"^[\w.-]+(/[\w.-]+)?$")


@dataclass(frozen=True, slots=True)
class Record:
    """One record as it stands in its file, or what is wrong with it."""

    file: int
    """Index into the reader's ``names``."""
    line: int
    """Line of a text file, row of a table or set; from 1."""
    fields: dict[str, Any] | None = None
    """Its fields; None where it could not be read."""
    problem: str | None = None
    """What is wrong with it."""


class Reader(Protocol):
    """A set of records in a fixed order."""

    names: list[str]
    """Files, or the hub name; ``Record.file`` points here."""

    def digest(self) -> str:
        """sha256 of what the records are, not of where they lie. Reads everything."""

    def marks(self) -> list[Any]:
        """What tells this set from others without reading it (JSON)."""

    def records(self, state: dict[str, Any] | None = None) -> Iterator[Record]:
        """All records, or those after ``state``."""

    def state(self) -> dict[str, Any]:
        """Where the last yielded record stands (JSON)."""


def open_source(source: Source, *, streaming: bool = False) -> Reader:
    """The reader of a source. Raises ``DataError`` where nothing is found under its path."""
    if source.path == "demo":
        return DemoReader(source.split)
    if (files := find_files(source.path)) is not None:
        return FileReader(files)
    if not _HUB_NAME.match(source.path) or source.path.lower().endswith(SUFFIXES):
        raise DataError(f"no file or directory {source.path!r}{_nearest(source.path)}")
    return HubReader(source, streaming=streaming)


def find_files(path: str) -> list[Path] | None:
    """Files of a path, directory (searched deeply) or glob, sorted by name; None where the path is nothing local."""
    here = Path(path).expanduser()
    if here.is_file():
        if here.suffix.lower() not in SUFFIXES:
            raise DataError(
                f"{path}: cannot read {here.suffix or 'a file without suffix'}; one of {' '.join(SUFFIXES)}"
            )
        return [here]
    if here.is_dir():
        found = sorted(p for p in here.rglob("*") if not any(q.startswith(".") for q in p.relative_to(here).parts))
    elif glob.has_magic(path):
        found = sorted(Path(p) for p in glob.glob(str(here), recursive=True))  # noqa: PTH207 - takes absolute patterns
    else:
        return None
    found = [p for p in found if p.is_file() and p.suffix.lower() in SUFFIXES]
    if not found:
        raise DataError(f"{path}: no file there ends in {' '.join(SUFFIXES)}")
    return found


def _nearest(path: str) -> str:
    parent = Path(path).expanduser().parent
    names = [p.name for p in parent.iterdir()] if parent.is_dir() else []
    close = get_close_matches(Path(path).name, names, n=1)
    return f"; did you mean {str(Path(path).parent / close[0])!r}?" if close else ""


class FileReader:
    """Local files, one after the other."""

    def __init__(self, files: list[Path]) -> None:
        self.names = [str(f) for f in files]
        self._files = files
        self._at = (0, 0)

    def digest(self) -> str:
        """sha256 over each file's type and bytes, in order."""
        total = hashlib.sha256()
        for path in self._files:
            try:
                with path.open("rb") as file:
                    total.update(f"{path.suffix.lower()}:{hashlib.file_digest(file, 'sha256').hexdigest()};".encode())
            except OSError as error:
                raise DataError(f"{path}: cannot be read: {error.strerror}") from error
        return total.hexdigest()

    def marks(self) -> list[Any]:
        """Names and sizes."""
        return [[f.name, f.stat().st_size] for f in self._files]

    def records(self, state: dict[str, Any] | None = None) -> Iterator[Record]:
        """See ``Reader``. Raises ``DataError`` for a file that cannot be read at all."""
        first, skip = (state["file"], state["line"]) if state else (0, 0)
        for index in range(first, len(self._files)):
            path = self._files[index]
            try:
                for line, fields, problem in _ROWS[path.suffix.lower()](path, skip):
                    self._at = (index, line)
                    yield Record(index, line, fields, problem)
            except OSError as error:
                raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
            skip = 0

    def state(self) -> dict[str, Any]:
        """See ``Reader``."""
        return {"file": self._at[0], "line": self._at[1]}


Row = tuple[int, dict[str, Any] | None, str | None]


def _json_rows(path: Path, skip: int) -> Iterator[Row]:
    """JSON lines, or one JSON array. Lines up to ``skip`` are not parsed; blank lines are no records."""
    with path.open("rb") as file:
        if path.suffix.lower() == ".json" and file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
            yield from _json_array(path, skip)
            return
        file.seek(0)
        for line, raw in enumerate(file, 1):
            if line <= skip or not raw.strip():
                continue
            try:
                value = json.loads(raw.decode("utf-8-sig" if line == 1 else "utf-8"))
            except UnicodeDecodeError as error:
                yield line, None, f"is not UTF-8 (byte {error.start + 1} of the line)"
            except (json.JSONDecodeError, RecursionError) as error:
                at = f" at column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
                yield line, None, f"is not JSON: {getattr(error, 'msg', 'nested too deeply')}{at}"
            else:
                yield line, *_mapping(value)


def _json_array(path: Path, skip: int) -> Iterator[Row]:
    try:
        values = json.loads(path.read_bytes().decode("utf-8-sig"))
    except ValueError as error:
        raise DataError(f"{path}: is not a JSON array: {error}") from error
    for item, value in enumerate(values, 1):
        if item > skip:
            yield item, *_mapping(value)


def _mapping(value: object) -> tuple[dict[str, Any] | None, str | None]:
    if isinstance(value, dict):
        return value, None
    return None, f"must be a JSON object, is {type(value).__name__}"


def _csv_rows(path: Path, skip: int) -> Iterator[Row]:
    """Rows under a header line. A row's line is where it starts; quoted fields may span lines."""
    csv.field_size_limit(2**31 - 1)  # the module's default of 128 KiB is short for a conversation
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.reader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
        try:
            header = next(reader, [])
        except csv.Error as error:
            raise DataError(f"{path}:1: the header is not CSV: {error}") from error
        if not header or len(set(header)) < len(header):
            raise DataError(f"{path}:1: the header must name each column once, is {header}")
        while True:
            line = reader.line_num + 1
            try:
                row = next(reader, None)
            except csv.Error as error:
                yield line, None, f"is not CSV: {error}"
                continue
            if row is None:
                return
            if line <= skip or not row:
                continue
            if len(row) != len(header):
                yield line, None, f"has {len(row)} fields, the header names {len(header)}"
            elif any("\udc80" <= char <= "\udcff" for field in row for char in field):
                yield line, None, "is not UTF-8"
            else:
                yield line, dict(zip(header, row, strict=True)), None


def _parquet_rows(path: Path, skip: int) -> Iterator[Row]:
    # Heavy: only where one is read. Ships no types.
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    try:
        with pq.ParquetFile(path) as file:
            start = 0
            groups: list[int] = []
            for group in range(file.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                if start + rows > skip or groups:
                    groups.append(group)
                else:
                    start += rows
            for batch in file.iter_batches(batch_size=1024, row_groups=groups) if groups else ():
                if start + len(batch) <= skip:
                    start += len(batch)
                    continue
                for fields in batch.to_pylist():
                    start += 1
                    if start > skip:
                        yield start, fields, None
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"{path}: is not a Parquet file, or is damaged: {error}") from error


_ROWS = {
    ".jsonl": _json_rows,
    ".ndjson": _json_rows,
    ".json": _json_rows,
    ".csv": _csv_rows,
    ".tsv": _csv_rows,
    ".parquet": _parquet_rows,
}


class HubReader:
    """A hub data set, through ``datasets``: from its cache, or streamed."""

    def __init__(self, source: Source, *, streaming: bool) -> None:
        from datasets import load_dataset  # seconds to import: only where it is used
        from datasets.exceptions import DatasetsError

        self.names = [f"{source.path}{f'/{source.subset}' if source.subset else ''}[{source.split}]"]
        try:
            self._set = load_dataset(source.path, source.subset, split=source.split, streaming=streaming)
        except (DatasetsError, OSError, ValueError) as error:
            raise DataError(
                f"data set {self.names[0]} is neither a local path nor loads from the hub: {error}"
            ) from error
        self._streaming = streaming
        self._row = 0
        features = self._set.features or {}
        self._classes = {k: f for k, f in features.items() if type(f).__name__ == "ClassLabel"}

    def digest(self) -> str:
        """sha256 of its name and of the fingerprint that ``datasets`` derives from its files."""
        return hashlib.sha256(f"{self.names[0]}:{self._set._fingerprint}:{len(self._set)}".encode()).hexdigest()

    def marks(self) -> list[Any]:
        """The name."""
        return list(self.names)

    def records(self, state: dict[str, Any] | None = None) -> Iterator[Record]:
        """See ``Reader``. Labels are given by name."""
        self._row = state["row"] if state else 0
        if self._streaming:
            self._set = self._set.with_format(None)  # a copy that begins at the beginning, whatever this one loaded
            if state:
                self._set.load_state_dict(state["stream"])
        for fields in self._set:
            self._row += 1
            problem = None
            for name, feature in self._classes.items():
                if isinstance(label := fields.get(name), int):
                    fields = {**fields, name: feature.int2str(label) if label >= 0 else None}
                    problem = problem if label >= 0 else f"{name}: is not given"
            yield Record(0, self._row, None if problem else fields, problem)

    def state(self) -> dict[str, Any]:
        """See ``Reader``. Of a streamed set only."""
        return {"row": self._row, "stream": self._set.state_dict()}


class DemoReader:
    """The generated demo task."""

    def __init__(self, split: str) -> None:
        if split not in DEMO_RECORDS:
            raise DataError(f"demo has no split {split!r}; one of {', '.join(DEMO_RECORDS)}")
        from orchestrator.data.demo import demo_records  # imported where used: most runs have records of their own

        self.names = [f"demo[{split}]"]
        self._records: list[dict[str, Any]] = list(demo_records(split, DEMO_RECORDS[split]))
        self._row = 0

    def digest(self) -> str:
        """sha256 of the records."""
        return hashlib.sha256(json.dumps(self._records, sort_keys=True).encode()).hexdigest()

    def marks(self) -> list[Any]:
        """The digest: the set is small."""
        return [self.digest()]

    def records(self, state: dict[str, Any] | None = None) -> Iterator[Record]:
        """See ``Reader``."""
        for row in range(state["row"] if state else 0, len(self._records)):
            self._row = row + 1
            yield Record(0, self._row, self._records[row])

    def state(self) -> dict[str, Any]:
        """See ``Reader``."""
        return {"row": self._row}

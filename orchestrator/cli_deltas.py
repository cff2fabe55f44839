"""``manta deltas``: list, show, import, promote, export, collect garbage."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from orchestrator.config import Base, Tracking
from orchestrator.delta import CONFIG, FILES, load_delta, new_dir, redacted
from orchestrator.errors import ConfigError, DeltaError

if TYPE_CHECKING:
    from orchestrator.registry import Registry, Version

app = typer.Typer(no_args_is_help=True, help="Registered deltas: list, show, import, promote, export, gc.")

Uri = Annotated[str | None, typer.Option("--uri", help="Tracking URI; default: $MLFLOW_TRACKING_URI, else local.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Ref = Annotated[str, typer.Argument(help="name, name:7 or name@alias")]


def _registry(uri: str | None, owner: str | None = None) -> "Registry":
    from orchestrator.registry import Registry  # here, so that --help does not load MLflow

    return Registry(Tracking(uri=uri, owner=owner))


def _print(table: Table) -> None:
    Console(soft_wrap=False).print(table)


def _say(text: str) -> None:
    Console(soft_wrap=True, highlight=False).print(escape(text))


def _record(version: "Version") -> dict[str, Any]:
    value: dict[str, Any] = redacted(asdict(version))
    return {**value, "ref": version.ref, "metrics": version.metrics, "moves": version.moves}


def _table(versions: list["Version"]) -> Table:
    table = Table()
    table.add_column("delta", no_wrap=True)  # what every other command takes
    for title in ("aliases", "method", "base", "metrics", "owner", "created"):
        table.add_column(title, overflow="fold")
    for v in versions:
        metrics = ", ".join(f"{key} {value:.4g}" for key, value in sorted(v.metrics.items())[:4])
        method = v.tags.get("manta.method") or v.tags.get("manta.peft_type", "").lower()
        cells = (v.ref, ", ".join(v.aliases), method, v.tags.get("manta.base.id", ""), metrics)
        table.add_row(*(escape(c) for c in (*cells, v.tags.get("manta.owner", ""), v.created[:16].replace("T", " "))))
    return table


@app.command("list")
def list_(
    name: Annotated[str | None, typer.Argument(help="One delta: all its versions.")] = None,
    as_json: Json = False,
    uri: Uri = None,
) -> None:
    """The newest version of every delta, and those with an alias; or every version of one."""
    registry = _registry(uri)
    if name:
        versions = registry.versions(registry.resolve(name).name)
    else:
        versions = [v for entry in registry.deltas() for v in entry.versions if v == entry.newest or v.aliases]
    if as_json:
        typer.echo(json.dumps([_record(v) for v in versions], indent=2))
    elif versions:
        _print(_table(versions))
    else:
        _say(f"no deltas at {registry.uri}; `manta train` makes one, `manta deltas import` takes one in")


@app.command()
def show(ref: Ref, as_json: Json = False, uri: Uri = None) -> None:
    """Everything that is known of one version: lineage, metrics, who moved which alias when."""
    version = _registry(uri).resolve(ref)
    if as_json:
        typer.echo(json.dumps(_record(version), indent=2))
        return
    table = Table(title=escape(version.ref), show_header=False)
    table.add_column()
    table.add_column(overflow="fold")  # a hash is of use only when it is whole
    rows: dict[str, Any] = {
        "aliases": ", ".join(version.aliases),
        "sha256": version.sha256,
        "created": version.created,
        "run": version.run_id,
        "files": version.source,
    }
    for alias, move in version.moves.items():
        came = f", from version {move['from']}" if move.get("from") else ""
        rows[f"{alias} moved here"] = f"{move.get('at')} by {move.get('by')}{came}"
    rows |= {f"metric {key}": f"{value:.6g}" for key, value in sorted(version.metrics.items())}
    hidden = ("manta.alias.", "manta.metrics", "manta.sha256", "manta.files", "manta.model_id", "manta.evaluation.")
    rows |= {k.removeprefix("manta."): v for k, v in sorted(version.tags.items()) if not k.startswith(hidden)}
    for key, value in redacted(rows).items():
        table.add_row(escape(key), escape(str(value or "")))
    _print(table)


@app.command("import")
def import_(
    directory: Annotated[Path, typer.Argument(help="A folder that peft's save_pretrained wrote.")],
    name: Annotated[str, typer.Option(help="Name it gets.")],
    base: Annotated[str | None, typer.Option(help="Base it was trained on; default: what its config says.")] = None,
    unchecked: Annotated[bool, typer.Option(help="Do not tie it to a base; nothing will catch a wrong one.")] = False,
    alias: Annotated[str | None, typer.Option(help="Alias that it gets.")] = "candidate",
    owner: Annotated[str | None, typer.Option(help="Owner; default: the login name.")] = None,
    uri: Uri = None,
) -> None:
    """Take in a plain peft folder."""
    registry = _registry(uri, owner)
    identity = None
    if not unchecked:
        from orchestrator.base import source_identity  # here, since it loads torch

        base = base or load_delta(directory).peft_config.get("base_model_name_or_path")
        if not base:
            raise DeltaError(f"{directory / CONFIG} does not say which base it is for; name it with --base")
        # How the base was held in training is not written in a peft folder.
        identity = source_identity(Base(id=base)).model_copy(update={"recipe": "unknown"})
    version = registry.import_peft(directory, name, identity=identity, alias=alias, owner=owner)
    _say(f"{version.ref} is registered" + (f" as {alias}" if alias else "") + f" at {registry.uri}")


@app.command()
def promote(
    ref: Ref,
    alias: Annotated[str, typer.Option(help="Alias to move.")] = "champion",
    by: Annotated[str | None, typer.Option(help="Who moves it; default: the login name.")] = None,
    if_better: Annotated[
        str | None, typer.Option(help="Only if this metric of `manta eval` is better, on the same records.")
    ] = None,
    than: Annotated[str | None, typer.Option(help="Alias to compare with; default: the one to move.")] = None,
    uri: Uri = None,
) -> None:
    """Move an alias to a version. Endpoints follow it without a restart."""
    if if_better is not None:
        from orchestrator.gate import promote_if_better

        _say(promote_if_better(_registry(uri), ref, if_better, alias=alias, than=than, by=by).why)
        return
    if than is not None:
        raise ConfigError("--than says whom --if-better METRIC compares with; give both or neither")
    version = _registry(uri).promote(ref, alias, by=by)
    _say(f"{version.name}@{alias} is version {version.version}")


@app.command()
def export(
    ref: Annotated[str, typer.Argument(help="name, name:7, name@alias, or a delta's folder")],
    peft: Annotated[Path | None, typer.Option(help="New folder for a plain peft delta.")] = None,
    merged: Annotated[Path | None, typer.Option(help="New folder for a dense model with the delta in it.")] = None,
    lora: Annotated[Path | None, typer.Option(help="New folder for the LoRA that is nearest to the delta.")] = None,
    rank: Annotated[int | None, typer.Option(help="Rank of that LoRA; default: 16.", min=1, max=4096)] = None,
    base: Annotated[
        str | None, typer.Option(help="Dense base that --merged and --lora need: hub name or folder.")
    ] = None,
    uri: Uri = None,
) -> None:
    """Write a delta out: as a plain peft folder, merged into a dense base, or as the LoRA that is nearest to it."""
    if sum(folder is not None for folder in (peft, merged, lora)) != 1:
        raise ConfigError("name one of --peft DIR, --merged DIR and --lora DIR")
    if (peft is None) != (base is not None):
        raise ConfigError("--merged DIR or --lora DIR and --base ID, a dense base, go together")
    if rank is not None and lora is None:
        raise ConfigError("--rank is that of --lora DIR; give both or neither")
    folder = Path(ref) if (Path(ref) / CONFIG).is_file() else _registry(uri).fetch(ref)
    delta = load_delta(folder)
    if peft is not None:
        if peft.exists() and not (peft.is_dir() and not any(peft.iterdir())):
            raise DeltaError(f"{peft} exists already; name a new folder")
        with new_dir(peft, "the peft folder") as scratch:
            for name in FILES:
                if (folder / name).exists():
                    shutil.copyfile(folder / name, scratch / name)
        _say(f"{ref} is in {peft}; load it with peft.PeftModel.from_pretrained(base, {str(peft)!r})")
    if merged is not None and base is not None:
        from orchestrator.merge import merged as merge  # here, since it loads torch

        for warning in merge(delta, base, merged):
            _say(f"warning: {warning}")
        _say(f"{ref} merged into {base} is in {merged}")
    if lora is not None and base is not None:
        from orchestrator.approximate import approximated  # here, since it loads torch

        found = approximated(delta, base, lora, rank=rank or 16)
        for warning in found.warnings:
            _say(f"warning: {warning}")
        if found.left_out:
            _say(f"warning: left out, since no LoRA can have them: {', '.join(found.left_out)}")
        _say(
            f"{ref} as a LoRA of rank {rank or 16} is in {lora}; relative error of a layer's change: worst "
            f"{found.worst[1]:.3g} ({found.worst[0]}), mean {found.mean:.3g}; of all of them {found.total:.3g}"
        )


@app.command()
def gc(
    name: Annotated[str | None, typer.Argument(help="Only this delta.")] = None,
    keep: Annotated[int, typer.Option(help="Newest versions of each delta to keep.", min=0)] = 5,
    yes: Annotated[bool, typer.Option("--yes", help="Delete; without it they are only listed.")] = False,
    uri: Uri = None,
) -> None:
    """Delete old versions that no alias points to. Lists them first; deletes with --yes."""
    registry = _registry(uri)
    versions = registry.collect_garbage(keep=keep, dry_run=not yes, name=name)
    if versions:
        _print(_table(versions))
    told = f"{len(versions)} version{'' if len(versions) == 1 else 's'}"
    _say(f"{told} deleted" if yes else f"{told} would be deleted; add --yes to do it")

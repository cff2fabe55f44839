"""The model card of a delta: ``README.md``."""

import json
from collections.abc import Mapping
from typing import Any

from orchestrator.config import Classification, Manifest


def card(manifest: Manifest | None, peft_config: Mapping[str, Any]) -> str:
    """Markdown with the front matter that model hubs read. JSON scalars are YAML, and quote anything."""
    base = manifest.base.id if manifest else str(peft_config.get("base_model_name_or_path") or "unknown")
    name = manifest.name if manifest else "adapter"
    labels = _labels(manifest)
    kind = "text-classification" if labels else "text-generation"
    front = {"base_model": base, "library_name": "peft", "pipeline_tag": kind}
    if manifest and manifest.base.licence:
        front["license"] = manifest.base.licence
    lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in front.items()), "tags: [manta, adapter]", "---"]
    lines += ["", f"# {name}", "", f"A delta for the frozen base `{_plain(base)}`.", ""]
    if manifest:
        knobs = manifest.method.model_dump(mode="json")
        rows = {
            "Method": ", ".join(f"{k} = {_plain(v)}" for k, v in knobs.items()),
            "Trained parameters": f"{manifest.parameters:,}",
            "Task": manifest.task.type,
            "Labels": ", ".join(labels),
            "Base revision": manifest.base.revision,
            "Base source weights": manifest.base.source_hash,
            "Base held as": manifest.base.recipe,
            "Licence of the base": manifest.base.licence,
            "Training samples": manifest.data_digest,
            "Continued from": manifest.parent,
            "Owner": manifest.owner,
            "Made": manifest.created,
            "Code": manifest.code,
            "Versions": ", ".join(f"{k} {v}" for k, v in manifest.versions.items()),
            "sha256": manifest.sha256,
            **{f"Tag {_plain(k)}": v for k, v in manifest.tags.items()},
        }
        lines += ["| | |", "|---|---|", *(f"| {k} | {_plain(v)} |" for k, v in rows.items() if v), ""]
        if manifest.metrics:
            lines += ["| Metric | Value |", "|---|---|"]
            lines += [f"| {_plain(k)} | {v:.6g} |" for k, v in sorted(manifest.metrics.items())] + [""]
    loader = "AutoModelForSequenceClassification" if labels else "AutoModelForCausalLM"
    options = f", num_labels={len(labels)}" if labels else ""
    lines += [
        "## Use",
        "",
        "```python",
        "from peft import PeftModel",
        f"from transformers import {loader}",
        "",
        f"base = {loader}.from_pretrained({json.dumps(base)}{options})",
        'model = PeftModel.from_pretrained(base, "path/to/this/folder")',
        "```",
        "",
    ]
    return "\n".join(lines)


def _labels(manifest: Manifest | None) -> tuple[str, ...]:
    task = manifest.task if manifest else None
    return (task.labels or ()) if isinstance(task, Classification) else ()


def _plain(value: object) -> str:
    """One table cell: no pipes, markup or line breaks from the outside."""
    return " ".join(str(value).replace("|", "\\|").replace("<", "&lt;").replace("`", "'").split())

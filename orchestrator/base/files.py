"""Where a base's files are, and its tokenizer."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoTokenizer

from orchestrator.config import Base
from orchestrator.errors import BaseModelError

DEMO = Path(__file__).parent.parent / "assets" / "demo"
_WANTED = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "*.md", "*.py"]


def base_dir(base: Base) -> Path:
    """Local directory of the base; a hub name is fetched (or found in the hub cache) first.

    Tokens of gated models, mirrors and offline mode are huggingface_hub's own: ``HF_TOKEN``, ``HF_ENDPOINT``,
    ``HF_HUB_OFFLINE``.

    Raises:
        BaseModelError: there is no such directory or model, it is gated, or it cannot be reached.
    """
    if base.id == "demo":
        return DEMO
    path = Path(base.id).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise BaseModelError(f"base {base.id}: the directory has no config.json (a transformers model has one)")
        return path.absolute()
    if path.is_absolute() or base.id.startswith(".") or base.id.count("/") > 1:
        raise BaseModelError(f"base {base.id}: there is no such directory")
    wanted = [p for p in _WANTED if base.trust_remote_code or p != "*.py"]
    if base.random_init is not None:
        wanted.remove("*.safetensors")
    try:
        return Path(snapshot_download(base.id, revision=base.revision, allow_patterns=wanted))
    except GatedRepoError as e:
        raise BaseModelError(f"base {base.id} is gated: accept its licence on the hub and set HF_TOKEN") from e
    except RepositoryNotFoundError as e:
        raise BaseModelError(f"base {base.id}: no such directory, and no hub model that HF_TOKEN may see") from e
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError) as e:
        reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise BaseModelError(f"base {base.id}: not a local directory, and the hub did not give it: {reason}") from e


def load_tokenizer(base: Base) -> Any:
    """The base's tokenizer, with a padding token (the end token where it has none)."""
    folder = base_dir(base)
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=base.trust_remote_code)
    except Exception as e:  # damaged files end in any kind, some in a bare Exception
        reason = " ".join(str(e).split())[:300]
        raise BaseModelError(f"base {base.id}: its tokenizer cannot be loaded: {type(e).__name__}: {reason}") from e
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    return tokenizer


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that hold the weights, in order.

    Raises:
        BaseModelError: there are none; pickled weights are named as the reason where it is that.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError) as e:
            raise BaseModelError(f"{index}: not a weight index ({e})") from e
        files = [folder / Path(name).name for name in names]
    elif (folder / "model.safetensors").is_file():
        files = [folder / "model.safetensors"]
    else:
        files = sorted(p for p in folder.glob("*.safetensors") if not p.name.startswith("adapter"))
    if absent := [p.name for p in files if not p.is_file()]:
        raise BaseModelError(f"base {folder}: weight files are missing: {', '.join(absent)}")
    if not files:
        pickled = [p.name for p in (*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth"))]
        why = (
            f"only pickled weights ({', '.join(pickled[:3])}), which can run code when read; convert them"
            if pickled
            else "no *.safetensors file"
        )
        raise BaseModelError(f"base {folder}: {why}")
    return files


class WeightReader:
    """Tensors of a model's safetensors files, one at a time.

    A file is opened anew for each tensor: a mapping kept open would count every page ever read as resident.
    """

    def __init__(self, folder: Path) -> None:
        self.files = weight_files(folder)
        self.where: dict[str, Path] = {}
        for path in self.files:
            with _open(path) as handle:
                self.where.update(dict.fromkeys(handle.keys(), path))

    def names(self) -> Iterator[str]:
        """Every tensor's name."""
        return iter(self.where)

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU, in the dtype it was saved in."""
        path = self.where[name]
        try:
            with _open(path) as handle:
                tensor: Tensor = handle.get_tensor(name)
                return tensor
        except SafetensorError as e:
            raise BaseModelError(f"{path}: tensor {name} cannot be read: {e}") from e


def _open(path: Path) -> Any:
    try:
        return safe_open(str(path), framework="pt")
    except (SafetensorError, OSError) as e:
        raise BaseModelError(f"{path}: not a safetensors file, or cut short ({e}); fetch it again") from e

"""Where things are kept on this machine."""

import os
from pathlib import Path


def home() -> Path:
    """``$MANTA_HOME``, else ``~/.manta``: caches, runs, the default tracking store."""
    return Path(os.environ.get("MANTA_HOME") or Path.home() / ".manta").expanduser().absolute()

"""Serve a base and its deltas: ``python jobs/serve.py jobs/runs/serve.yaml [key=value ...]``, here or as a Ray job."""

import sys
from pathlib import Path

# A job's upload is not installed; the folder above this one is where the package lies.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from orchestrator.cli import main

if __name__ == "__main__":
    main(["serve", *sys.argv[1:]])

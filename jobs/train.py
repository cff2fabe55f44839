"""Train one delta: ``python jobs/train.py jobs/runs/quickstart.yaml method.rank=32``, here or as a Ray job.

As a job: ``ray job submit --working-dir . -- python jobs/train.py jobs/runs/quickstart.yaml``.
"""

import sys
from pathlib import Path

# A job's upload is not installed; the folder above this one is where the package lies.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from orchestrator.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])

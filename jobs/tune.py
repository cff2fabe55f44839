"""Search for a delta: ``python jobs/tune.py jobs/runs/search.yaml budget=48``, here or as a Ray job.

As a job: ``ray job submit --working-dir . -- python jobs/tune.py jobs/runs/search.yaml``.
"""

import sys
from pathlib import Path

# A job's upload is not installed; the folder above this one is where the package lies.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from orchestrator.cli import main

if __name__ == "__main__":
    main(["tune", *sys.argv[1:]])

"""Serve a base and its deltas: ``python jobs/serve.py jobs/runs/serve.yaml [key=value ...]``."""

import sys

from orchestrator.config.load import load_serving
from orchestrator.errors import MantaError
from orchestrator.launch.serve import serve

if __name__ == "__main__":
    files = [word for word in sys.argv[1:] if "=" not in word]
    try:
        serve(load_serving(files[0] if files else None, [word for word in sys.argv[1:] if "=" in word]))
    except MantaError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)

"""What a training run takes: memory and processor time of its processes."""

import json
import os
import threading
import time
from pathlib import Path
from statistics import median


class Watch:
    """Looks at training processes: their highest resident memory, and the processor time they take."""

    def __init__(self, children: str = "") -> None:
        self.peak, self.count, self.cpu_s = 0, 0, 0.0
        self._children, self._over, self._begin = children, threading.Event(), 0.0
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def begin(self) -> None:
        """Processor time counts from here."""
        self._look()
        self._begin, self.cpu_s = self.cpu_s + self._begin, 0.0

    def _run(self) -> None:
        while not self._over.wait(0.5):
            self._look()

    def _look(self) -> None:
        import psutil

        me = psutil.Process()
        memory, cpu = [], 0.0
        for process in me.children(recursive=True) if self._children else [me]:
            try:
                if self._children in "".join(process.cmdline()):
                    memory.append(process.memory_info().rss)
                    cpu += sum(process.cpu_times()[:2])
            except psutil.Error:
                continue  # gone in the meantime
        self.count = max(self.count, len(memory))
        self.peak = max([self.peak, *memory])
        self.cpu_s = max(self.cpu_s, cpu - self._begin)


def keep(
    out: Path, name: str, seed: int, steps: list[dict[str, float]], watch: Watch, begin: float, **more: float
) -> None:
    """What a side measured. Speed by the clock is the median step's, since others may use the machine too."""
    tokens = [s["tokens_per_s"] * s["seconds_per_step"] for s in steps]
    result = {
        "losses": [s["loss"] for s in steps],
        "lrs": [s["lr"] for s in steps],
        "tokens_per_s": median(s["tokens_per_s"] for s in steps),
        "tokens_per_cpu_s": sum(tokens[1:]) / watch.cpu_s,
        "train_s": sum(s["seconds_per_step"] for s in steps),
        "wall_s": time.monotonic() - begin,
        "peak_gib": watch.peak / 2**30,
        "processes": watch.count,
        "load": os.getloadavg()[1],
        **more,
    }
    (out / f"{name}-{seed}.json").write_text(json.dumps(result))

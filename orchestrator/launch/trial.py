"""What Ray Tune calls a trial: an actor that queues at the desk and passes on what a pack says. No torch here."""

from typing import Any

import ray
from ray import tune


def trial_id(number: int) -> str:
    """Name of a trial's row and of its checkpoints."""
    return f"trial-{number:05d}"


class TrialActor(tune.Trainable):  # type: ignore[misc]
    """Offers its point to the desk; each step waits for one evaluation. An actor serves many trials, one by one.

    Started again after a crash, it hears the evaluations so far once more, and goes on waiting.
    """

    def setup(self, config: dict[str, Any], desk: Any = None) -> None:
        """Take a first point."""
        self._desk = desk
        self._trial, self._seen = "", 0
        self._offer(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take another point."""
        self._offer(new_config)
        return True

    def step(self) -> dict[str, Any]:
        """One evaluation, or the end."""
        found: dict[str, Any] = ray.get(self._desk.result.remote(self._trial, self._seen))
        self._seen = found["evaluation"]
        return found

    def _offer(self, config: dict[str, Any]) -> None:
        params = dict(config)
        number = params.pop("number")
        self._trial, self._seen = trial_id(number), 0
        ray.get(self._desk.offer.remote(self._trial, number, params))

"""Deltas that come, move and go while requests run."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from orchestrator.config import Identity, Tracking
from orchestrator.errors import DeltaError, ServeError, WrongBaseError
from orchestrator.registry import Registry
from orchestrator.serve.deltas import UnknownModelError
from tests.endpoint_kit import Server, ask, chat_text, delta, truth


def test_configured_deltas_are_checked_before_they_are_served(tmp_path):
    other = Identity(id="other", source_hash="b" * 64, recipe="none/fp32")
    delta(tmp_path / "wrong", 1, name="wrong", base=other)
    with pytest.raises(WrongBaseError) as caught:
        Server(deltas=[str(tmp_path / "wrong")])
    assert "a" * 64 in str(caught.value)
    assert "b" * 64 in str(caught.value)
    delta(tmp_path / "tiny", 1, name="tiny")
    with pytest.raises(ServeError, match="that is the base"):
        Server(deltas=[str(tmp_path / "tiny")])
    with pytest.raises(DeltaError, match="no such folder"):
        Server(deltas=[str(tmp_path / "nothing")])
    delta(tmp_path / "good", 1, name="good")
    with Server(deltas=[str(tmp_path / "good")]) as made:
        with pytest.raises(WrongBaseError):
            made.deltas.configure([str(tmp_path / "good"), str(tmp_path / "wrong")])
        assert ask(made, "good").choices  # what was served before still is
        made.deltas.configure([])
        with pytest.raises(openai.NotFoundError):
            ask(made, "good")
        made.engine.call(lambda: None).result()
        assert made.bank.slots == ()


def test_a_moved_alias_swaps_the_delta_under_load(tmp_path):
    registry = Registry(Tracking(uri=f"sqlite:///{tmp_path / 'mlflow.db'}"))
    saved = [delta(tmp_path / str(i), i, name="support") for i in range(3)]
    versions = [
        registry.publish(s.path, name="support", run=None, metrics={}, alias=None, tags={}, owner="me") for s in saved
    ]
    registry.promote("support:1", "champion")
    probe = "swap"
    with Server(registry, ["support"], refresh_s=0.2, rows=8) as made:
        right = {
            f"fp_{v.key[:16]}": chat_text(made, probe, 30, truth(s))[0] for v, s in zip(versions, saved, strict=True)
        }
        assert len(set(right.values())) == 3
        answers, stop = [], threading.Event()

        def load():
            while not stop.is_set():
                got = ask(made, "support", probe, max_tokens=30)
                answers.append((got.system_fingerprint, got.choices[0].message.content))

        with ThreadPoolExecutor(4) as pool:
            runs = [pool.submit(load) for _ in range(4)]
            for number in (2, 3, 1, 2):
                registry.promote(f"support:{number}", "champion")
                end = time.monotonic() + 20
                while made.deltas.models()["support"].label != f"support:{number}":
                    assert time.monotonic() < end
                    time.sleep(0.05)
                time.sleep(0.1)
            stop.set()
            for run in runs:
                run.result()  # raises where a request failed
        assert {f for f, _ in answers} == set(right)
        assert all(right[f] == text for f, text in answers)  # none of two versions
        assert ask(made, "support").system_fingerprint == f"fp_{versions[1].key[:16]}"
        made.idle()
        # a number and another alias are loaded when asked for; what is not there is not
        assert (
            ask(made, "support:3", probe, max_tokens=30).choices[0].message.content
            == right[f"fp_{versions[2].key[:16]}"]
        )
        with pytest.raises(openai.NotFoundError, match="support:9"):
            ask(made, "support:9")
        with pytest.raises(openai.NotFoundError):
            ask(made, "support@candidate")
        with pytest.raises(UnknownModelError):
            made.deltas.load("elsewhere")
        made.deltas.refresh()
        made.engine.call(lambda: None).result()
        assert len(made.bank.slots) == 2

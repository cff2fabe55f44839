"""The desk between trials and packs, with nobody behind it."""

from typing import Any

import pytest

from orchestrator.train.desk import Desk, Lease, Orders


def lease(name: str, lane: str = "packed") -> Lease:
    return Lease(name, lane, {"name": name})


def kinds(desk: Desk) -> list[tuple[str, str, Any]]:
    return [(trial, kind, values.get("why", values.get("reason"))) for trial, kind, values in desk.drain()]


@pytest.fixture
def desk() -> Desk:
    made = Desk()
    for name in "abc":
        made.offer(lease(name))
    made.hello("p", "packed")
    return made


def test_a_pack_takes_as_many_as_it_has_room_for(desk: Desk) -> None:
    assert [x.trial for x in desk.orders("p", 2).join] == ["a", "b"]
    assert [x.trial for x in desk.orders("p", 2).join] == ["c"]
    assert desk.load() == {}


def test_a_trial_that_is_offered_again_stays_where_it_is(desk: Desk) -> None:
    desk.orders("p", 1)
    for name in "abc":
        desk.offer(lease(name))
    assert desk.load() == {"packed": 3}
    assert [x.trial for x in desk.orders("p", 9).join] == ["b", "c"]


def test_what_a_lost_pack_held_comes_first_again(desk: Desk) -> None:
    desk.orders("p", 2)
    desk.withdraw("b")
    desk.hello("p", "packed")
    assert kinds(desk) == [("b", "ended", "withdrawn"), ("a", "left", None)]
    assert [x.trial for x in desk.orders("p", 9).join] == ["a", "c"]


def test_a_withdrawn_trial_leaves_until_it_has_left(desk: Desk) -> None:
    desk.orders("p", 3)
    desk.withdraw("a")
    assert desk.orders("p", 0).leave == desk.orders("p", 0).leave == ("a",)
    desk.tell("p", [("a", "ended", {"why": "withdrawn"})])
    assert desk.orders("p", 1) == Orders()
    desk.withdraw("a")
    assert kinds(desk) == [("a", "ended", "withdrawn")], "once"


def test_a_withdrawn_trial_that_is_put_back_does_not_queue(desk: Desk) -> None:
    desk.orders("p", 3)
    desk.withdraw("a")
    desk.tell("p", [("a", "left", {"step": 1, "reason": "out of memory"})])
    assert kinds(desk) == [("a", "ended", "withdrawn")]
    assert desk.orders("p", 3) == Orders()


def test_a_lane_has_a_sample_when_its_queue_is_empty_again(desk: Desk) -> None:
    """A pack that is about to start asks, while another one takes the last trial."""
    desk.orders("p", 3)
    assert desk.sample("packed") == {"name": "a"}


def test_a_slot_that_is_left_is_filled_at_once(desk: Desk) -> None:
    desk.orders("p", 2)
    desk.withdraw("a")
    assert desk.orders("p", 0) == Orders(join=(lease("c"),), leave=("a",))


def test_parked_trials_have_not_ended(desk: Desk) -> None:
    desk.orders("p", 2)
    desk.park()
    assert desk.orders("p", 1) == Orders(leave=("a", "b"), close=True)
    desk.tell("p", [("a", "ended", {"why": "withdrawn"}), ("b", "ended", {"why": "failed", "reason": "full"})])
    assert kinds(desk) == [("a", "left", None), ("b", "left", None)]
    assert desk.load() == {"packed": 3}


def test_a_lane_that_no_pack_can_take_fails_all_its_trials(desk: Desk) -> None:
    desk.orders("p", 1)
    desk.offer(lease("x", "solo"))
    desk.give_up("packed", "no base")
    desk.offer(lease("late"))
    desk.gone("p")
    failed = [(name, "ended", "failed") for name in ("b", "c", "late", "a")]
    assert kinds(desk) == failed
    assert desk.load() == {"solo": 1}


def test_an_idle_pack_makes_room_for_a_lane_without_one(desk: Desk) -> None:
    desk.orders("p", 3)
    desk.offer(lease("x", "solo"))
    assert not desk.orders("p", 0).close, "it has work"
    desk.tell("p", [(name, "ended", {"why": "finished"}) for name in "abc"])
    assert desk.orders("p", 3).close
    desk.hello("q", "solo")
    assert not desk.orders("p", 3).close

"""Which trial comes next; time is a number that the test moves on."""

from pathlib import Path
from typing import Any

import pytest

from tests.tuning.sweep_file import RANDOM, TPE, begin, end, plan_of
from tuning.sweep_journal import Begun, SweepJournal
from tuning.sweep_loading import SweepPlan
from tuning.sweep_queue import Next, SweepQueue

TOKENS_PER_STEP = 1000
STEPS = 100
NINE: dict[str, Any] = {
    "space": {
        "optimizer.lr": {"kind": "grid", "values": [0.001, 0.002, 0.003]},
        "optimizer.beta2": {"kind": "grid", "values": [0.9, 0.95, 0.99]},
    }
}


class Clock:
    """Seconds."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Scene:
    """A queue, and trials that begin and end."""

    def __init__(self, plan: SweepPlan, path: Path, slots: int = 2, seconds_before: float = 0.0) -> None:
        self.clock, self.journal = Clock(), SweepJournal.read(path)
        self.queue = SweepQueue(plan, self.journal, slots, TOKENS_PER_STEP, seconds_before, self.clock)

    def begin(self, wanted: Any = None) -> str:
        """The next trial, which must be there, if it was not handed out yet."""
        wanted = wanted or self.queue.next()
        assert isinstance(wanted, Next), wanted
        name = f"{wanted.number}-{wanted.seed}"
        assert name not in self.journal.trials
        self.journal.add(Begun(name, wanted.number, wanted.seed, wanted.values, wanted.phase, "/r"))
        return name

    def end(self, name: str, loss: float | None = None, **more: Any) -> None:
        number, seed = map(int, name.split("-"))
        # The second seed turns the order round.
        end(self.journal, name, number + seed * (30.0 - 3 * number) if loss is None else loss, **more)

    def run(self, seconds: float = 10.0, step: int = STEPS) -> list[str]:
        """All trials, one after the other."""
        names = []
        while (word := self.queue.next()) not in ("wait", "end"):
            names.append(self.begin(word))
            self.clock.now += seconds
            self.end(names[-1], seconds=seconds, step=step)
        assert word == "end"
        return names


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "trials.jsonl"


def test_a_grid_ends_by_itself_with_every_point_tried_with_every_seed(tmp_path: Path, path: Path) -> None:
    scene = Scene(plan_of(tmp_path, {**NINE, "seeds": 2, "settings": ["seed=5"]}), path)
    assert scene.queue.left == 18
    assert scene.run() == [f"{number}-{seed}" for number in range(9) for seed in (5, 6)]
    points = {tuple(trial.values.values()) for trial in scene.journal.trials.values()}
    assert points == {(lr, beta) for lr in (0.001, 0.002, 0.003) for beta in (0.9, 0.95, 0.99)}
    assert (scene.queue.exhausted, scene.queue.left) == ("every point of the space was tried", 0)


@pytest.mark.parametrize(("budget", "count"), [({"trials": 5}, 4), ({"trials": 6}, 6), ({"trials": 100}, 18)])
def test_no_configuration_is_begun_that_trials_do_not_reach_for(
    tmp_path: Path, path: Path, budget: dict[str, int], count: int
) -> None:
    scene = Scene(plan_of(tmp_path, {**NINE, "seeds": 2, "budget": budget}), path)
    assert len(scene.run()) == count


def test_tokens_are_counted_as_they_were_read(tmp_path: Path, path: Path) -> None:
    # A whole trial has 100,000: there is room for three. Pruned at 20 steps, all nine fit; at 60, four do.
    plan = plan_of(tmp_path, {**NINE, "budget": {"tokens": 300_000}})
    assert len(Scene(plan, path).run()) == 3
    assert len(Scene(plan, tmp_path / "pruned.jsonl").run(step=20)) == 9
    assert len(Scene(plan, tmp_path / "half.jsonl").run(step=60)) == 4
    # Those that run count whole.
    scene = Scene(plan, tmp_path / "running.jsonl")
    assert [scene.begin() for _ in range(3)] == ["0-0", "1-0", "2-0"]
    assert scene.queue.next() == "end"
    assert scene.queue.exhausted == "the budget of 300,000 tokens has no room for another configuration"


def test_tokens_that_the_final_reads_are_kept_for_it(tmp_path: Path, path: Path) -> None:
    # Of room for seven trials the final has two.
    changes = {**NINE, "budget": {"tokens": 700_000}, "confirm": {"top": 2, "seeds": 2}}
    plan = plan_of(tmp_path, changes)
    scene = Scene(plan, path)
    assert scene.run() == ["0-0", "1-0", "2-0", "3-0", "4-0", "0-1", "1-1"]
    assert scene.queue.exhausted == "the budget of 700,000 tokens has no room for another configuration"
    # What the final has read counts when a sweep goes on with more: 7 + 1 + 2 are ten.
    grown = Scene(plan_of(tmp_path, {**changes, "budget": {"tokens": 999_999}}), path)
    assert grown.run() == []
    grown = Scene(plan_of(tmp_path, {**changes, "budget": {"tokens": 1_000_000}}), path)
    assert grown.run() == ["5-0"]


@pytest.mark.parametrize(
    ("slots", "before", "confirm", "count"),
    [
        (1, 0.0, None, 6),
        (1, 130.0, None, 4),  # of 360 seconds, 130 are gone already
        # What the final takes is kept for it.
        (1, 0.0, {"top": 2, "seeds": 2}, 4),
    ],
)
def test_minutes_hold_what_would_end_within_them_the_final_included(
    tmp_path: Path, path: Path, slots: int, before: float, confirm: Any, count: int
) -> None:
    plan = plan_of(tmp_path, {**NINE, "budget": {"minutes": 6}, "confirm": confirm})
    scene = Scene(plan, path, slots, before)
    names = scene.run(seconds=57.0)
    search = [name for name in names if scene.journal.trials[name].begun.phase == "search"]
    assert len(search) == count
    assert len(names) == count + (2 if confirm else 0)
    assert scene.queue.seconds == before + 57 * len(names) <= 360
    assert scene.queue.exhausted == "the budget of 6 minutes has no room for another configuration"


def test_slots_share_what_is_to_come(tmp_path: Path, path: Path) -> None:
    scene = Scene(plan_of(tmp_path, {**NINE, "budget": {"minutes": 2}}), path, slots=2)
    first, _ = scene.begin(), scene.begin()
    scene.clock.now += 50
    scene.end(first, seconds=50.0)
    # One runs and one would be begun: 2 x 50 / 2 seconds more are 100 of 120.
    third = scene.begin()
    scene.clock.now += 1
    scene.end(third, seconds=50.0)
    scene.begin()  # 51 + 50 again
    scene.clock.now += 20
    assert scene.queue.next() == "end"  # 71 + 3 x 25


def test_what_is_left_is_told_at_the_pace_so_far(tmp_path: Path, path: Path) -> None:
    scene = Scene(plan_of(tmp_path, {**NINE, "confirm": {"top": 2, "seeds": 3}}), path, slots=2)
    assert (scene.queue.left, scene.queue.seconds_left(0)) == (13, None)
    first, _ = scene.begin(), scene.begin()
    scene.clock.now += 8
    scene.end(first, seconds=8.0)
    assert scene.queue.left == 7 + 4
    assert scene.queue.seconds_left(0) == (7 + 4 + 1) * 8 / 2
    assert scene.queue.seconds_left(STEPS // 4) == (7 + 4 + 0.75) * 8 / 2


def test_what_is_left_is_no_more_than_the_minutes_hold(tmp_path: Path, path: Path) -> None:
    scene = Scene(plan_of(tmp_path, {**NINE, "budget": {"minutes": 2}}), path, slots=1)
    assert scene.queue.seconds_left(0) == 120
    first = scene.begin()
    scene.clock.now += 40
    scene.end(first, seconds=40.0)
    assert scene.queue.seconds_left(0) == 80  # 8 x 40 else


def test_trials_that_an_earlier_command_began_do_not_set_the_pace(tmp_path: Path, path: Path) -> None:
    # Their seconds are those since the resume, and their steps all of them: by those there would be room for a fourth.
    scene = Scene(plan_of(tmp_path, {**NINE, "budget": {"minutes": 3}}), path, slots=1)
    for _ in range(3):
        scene.end(scene.begin(), seconds=1.0, resumed=True)
        scene.clock.now += 1
    assert len(scene.run(seconds=50.0)) == 3


def test_a_final_is_of_no_more_configurations_than_the_budget_holds(tmp_path: Path, path: Path) -> None:
    changes = {**NINE, "confirm": {"top": 5, "seeds": 3}, "budget": {"trials": 2}}
    scene = Scene(plan_of(tmp_path, changes), path)
    assert scene.queue.left == 2 + 4
    assert len(scene.run()) == 6


def test_the_final_gives_the_best_the_seeds_that_they_lack_seed_by_seed(tmp_path: Path, path: Path) -> None:
    scene = Scene(plan_of(tmp_path, {**NINE, "confirm": {"top": 3, "seeds": 3}}), path)
    losses = [5.0, 2.0, 9.0, 1.0, 7.0, 3.0, 1.5, 8.0, 6.0]
    for number, loss in enumerate(losses):
        name = scene.begin()
        if number == 8:
            assert scene.queue.next() == "wait"  # the best are not known yet
        # The third and the best in loss do not count: one diverged, and one was pruned.
        outcome = {3: "pruned", 6: "diverged"}.get(number, "finished")
        scene.end(name, loss, outcome=outcome)
    finals = [scene.begin() for _ in range(6)]
    assert finals == ["1-1", "5-1", "0-1", "1-2", "5-2", "0-2"]
    assert scene.queue.next() == "wait"
    for name in finals:
        assert scene.journal.trials[name].begun.phase == "final"
        assert scene.journal.trials[name].values == scene.journal.trials[f"{name[0]}-0"].values
        scene.end(name, 4.0)
    assert scene.queue.next() == "end"


@pytest.mark.parametrize("done", range(1, 6))
def test_a_final_that_was_interrupted_goes_on_with_the_same_configurations(
    tmp_path: Path, path: Path, done: int
) -> None:
    plan = plan_of(tmp_path, {**NINE, "confirm": {"top": 2, "seeds": 4}})
    scene = Scene(plan, path)
    for _ in range(9):
        scene.end(scene.begin())
    begun = [scene.begin() for _ in range(done)]
    for name in begun[:-1]:
        scene.end(name, 99.0)  # in the final they do badly, but it is theirs
    again = Scene(plan, path)
    again.end(begun[-1], 99.0)  # the one that was at work is the trials' affair, not the queue's
    rest = again.run()
    assert begun + rest == ["0-1", "1-1", "0-2", "1-2", "0-3", "1-3"]


def test_seeds_that_a_configuration_lacks_come_before_new_ones(tmp_path: Path, path: Path) -> None:
    plan = plan_of(tmp_path, {**NINE, "seeds": 3})
    scene = Scene(plan, path)
    for _ in range(4):
        scene.end(scene.begin())
    whole = [f"{number}-{seed}" for number in range(9) for seed in range(3)]
    again = Scene(plan, path)
    assert again.queue.left == 23
    assert list(scene.journal.trials) + again.run() == whole
    points = {trial.begun.number: trial.values for trial in scene.journal.trials.values()}
    assert all(
        points[trial.begun.number] == trial.values
        for trial in again.journal.trials.values()
        if trial.begun.number in points
    )


@pytest.mark.parametrize(
    "changes",
    [RANDOM, TPE, {**NINE, "budget": {"trials": 8}}, {**TPE, "seeds": 2, "budget": {"trials": 16}}],
)
def test_a_resumed_search_asks_for_what_it_would_have_asked_for(
    tmp_path: Path, path: Path, changes: dict[str, Any]
) -> None:
    plan = plan_of(tmp_path, changes)
    whole = Scene(plan, tmp_path / "whole.jsonl")
    count = changes.get("seeds", 1) * 8
    assert len(whole.run()) == count
    cut = Scene(plan, path)
    for _ in range(count * 3 // 4):
        cut.end(cut.begin())
    again = Scene(plan, path)
    again.run()
    assert [t.values for t in again.journal.trials.values()] == [t.values for t in whole.journal.trials.values()]


def test_a_resumed_search_knows_what_still_runs(tmp_path: Path, path: Path) -> None:
    plan = plan_of(tmp_path, {**TPE, "budget": {"trials": 30}})
    scene = Scene(plan, path)
    names = [scene.begin() for _ in range(16)]
    for name in names[:6]:
        scene.end(name)
    again = Scene(plan, path)
    assert again.queue.next() == scene.queue.next()


def test_an_estimator_learns_from_configurations_whose_seeds_are_all_over(tmp_path: Path, path: Path) -> None:
    # Told with half of its seeds, a configuration would weigh in with another loss after a resume.
    plan = plan_of(
        tmp_path, {**TPE, "searcher": {"kind": "tpe", "startup_trials": 1}, "budget": {"trials": 20}, "seeds": 2}
    )
    journal = SweepJournal(path)
    for number in range(3):
        for seed in (0, 1):
            end(journal, begin(journal, number, seed, {"optimizer.lr": 0.001 * (number + 1)}), 3.0 + number)

    def suggested(loss: float | None) -> Any:
        copied = tmp_path / f"{loss}.jsonl"
        copied.write_bytes(path.read_bytes())
        known = SweepJournal.read(copied)
        one, _ = (begin(known, 3, seed, {"optimizer.lr": 0.005}) for seed in (0, 1))
        if loss is not None:
            end(known, one, loss)
        wanted = SweepQueue(plan, known, 2, TOKENS_PER_STEP, 0.0).next()
        assert isinstance(wanted, Next)
        return wanted.values

    assert suggested(0.1) == suggested(9.0) == suggested(None)

"""What a sweep remembers, whatever cut its file short."""

from pathlib import Path

import pytest

from tests.tuning.sweep_file import begin, end
from tuning.sweep_journal import Again, Begun, Ended, Exploit, Line, Rung, SweepJournal


def lines() -> list[Line]:
    return [
        Begun("a", 0, 7, {"optimizer.lr": 0.1, "stability.clip": {"kind": "none"}}, "search", "/runs/a"),
        Begun("b", 1, 7, {"optimizer.lr": 0.2}, "final", "/runs/b"),
        Rung("a", 16, 3.5, goes_on=True),
        Exploit("b", "a", 16, {"optimizer.lr": 0.12}),
        Ended("a", "diverged", 20, 1.5, {"val_loss": 5.5, "diverged": 1.0}, "größer\u2028als zuvor"),
    ]


def test_what_is_written_is_what_is_read(tmp_path: Path) -> None:
    path = tmp_path / "sweep" / "trials.jsonl"
    journal = SweepJournal.read(path)
    assert (journal.trials, journal.rungs) == ({}, [])
    for line in lines():
        journal.add(line)
    again = SweepJournal.read(path)
    assert (again.trials, again.rungs) == (journal.trials, journal.rungs)
    a, b = again.trials["a"], again.trials["b"]
    begun_a, begun_b, rung, exploit, ended = lines()
    assert (a.begun, a.rungs, a.exploits, a.ended) == (begun_a, (rung,), (), ended)
    assert (b.begun, b.rungs, b.exploits, b.ended) == (begun_b, (), (exploit,), None)


def test_values_and_step_are_the_last_that_are_known(tmp_path: Path) -> None:
    journal = SweepJournal(tmp_path / "trials.jsonl")
    begin(journal, 0, values={"optimizer.lr": 0.1})
    name = next(iter(journal.trials))
    assert (journal.trials[name].step, journal.trials[name].values) == (0, {"optimizer.lr": 0.1})
    journal.add(Rung(name, 10, 3.0, goes_on=True))
    journal.add(Exploit(name, "x", 10, {"optimizer.lr": 0.2}))
    journal.add(Exploit(name, "x", 20, {"optimizer.lr": 0.3}))
    assert (journal.trials[name].step, journal.trials[name].values) == (10, {"optimizer.lr": 0.3})
    end(journal, name, 2.0, step=33)
    assert journal.trials[name].step == 33
    journal.add(Again(name))
    assert (journal.trials[name].step, journal.trials[name].ended) == (10, None)
    assert SweepJournal.read(journal.path).trials == journal.trials


@pytest.mark.parametrize("left", ["all but the end", "half", "within a character", "one byte"])
def test_a_line_that_a_kill_cut_short_is_left_out_and_what_follows_is_read(tmp_path: Path, left: str) -> None:
    path = tmp_path / "trials.jsonl"
    journal = SweepJournal(path)
    for line in lines()[:-1]:
        journal.add(line)
    whole = path.read_bytes()
    journal.add(lines()[-1])
    last = path.read_bytes()[len(whole) :].rstrip(b"\n")
    cuts = {"all but the end": len(last) - 1, "half": len(last) // 2, "one byte": 2}
    cut = cuts.get(left, last.index("ö".encode()) + 1)
    path.write_bytes(whole + last[:cut])
    resumed = SweepJournal.read(path)
    assert resumed.trials["a"].ended is None
    end(resumed, "a", 5.5, "finished")
    end(resumed, "b", 2.5)
    again = SweepJournal.read(path)
    assert again.trials == resumed.trials
    assert [trial.ended is not None for trial in again.trials.values()] == [True, True]


def test_a_rung_that_is_passed_a_second_time_counts_once(tmp_path: Path) -> None:
    journal = SweepJournal(tmp_path / "trials.jsonl")
    names = [begin(journal, number) for number in (0, 1)]
    for name, step, loss in [(names[0], 10, 3.0), (names[1], 10, 4.0), (names[0], 10, 9.0), (names[0], 20, 2.0)]:
        journal.add(Rung(name, step, loss, goes_on=True))
    for known in (journal, SweepJournal.read(journal.path)):
        assert [(rung.name, rung.step, rung.loss) for rung in known.rungs] == [
            (names[0], 10, 3.0),
            (names[1], 10, 4.0),
            (names[0], 20, 2.0),
        ]
        assert [rung.loss for rung in known.trials[names[0]].rungs] == [3.0, 2.0]


def test_trials_can_be_gone_through_while_others_begin(tmp_path: Path) -> None:
    journal = SweepJournal(tmp_path / "trials.jsonl")
    begin(journal, 0)
    begin(journal, 1)
    seen = []
    for name in journal.trials:
        seen.append(name)
        begin(journal, len(journal.trials))
    assert seen == ["trial-00-s0", "trial-01-s0"]
    assert len(journal.trials) == 4

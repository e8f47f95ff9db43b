"""The arguments of this wing's commands, whatever they are to run."""

import pytest

from pipelines.command_line import parse
from pipelines.errors import UserError
from tuning.arguments import CompareArguments, ReplayArguments, StudyArguments, SweepArguments


def study(*argv: str) -> StudyArguments:
    return parse(StudyArguments, argv, "study")


def test_without_an_argument_nothing_is_to_be_run() -> None:
    arguments = study()
    assert (arguments.study, arguments.resume, arguments.settings, arguments.changed) == ([], None, [], {})


def test_what_is_given_in_place_of_the_study_s_own() -> None:
    assert study("balance", "--blocks", "3").changed == {"blocks": 3}
    assert study("--budget-minutes", "0.5", "balance").changed == {"budget_minutes": 0.5}
    assert study("balance", "--set", "seed=1", "--set", "a=[1,2]").settings == ["seed=1", "a=[1,2]"]


def test_a_study_that_goes_on_may_have_another_length() -> None:
    arguments = study("--resume", "balance-1", "--blocks", "9", "--budget-minutes", "5", "--findings", "f.md")
    assert (arguments.resume, arguments.changed) == ("balance-1", {"blocks": 9, "budget_minutes": 5.0})


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["balance", "clip"], "one study at a time; leave out clip"),
        (["--resume", "x", "balance"], "--resume takes the study as it was begun, so no name may be given; leave out"),
        (["--resume", "x", "--set", "seed=1"], "--set: a study that goes on keeps its config"),
        (["--resume", "x", "--print-config"], "--print-config shows what a study expands to, so it does not go with"),
        (["--print-config"], "no study given; name one, for example: steadymoe study balance"),
        (["--findings", "x.md"], "no study given"),
        (["--blocks", "2"], "no study given"),
        (["balance", "--blocks", "0"], "--blocks 0: should be greater than 0"),
        (["balance", "--blocks", "1.5"], "--blocks 1.5: should be a valid integer"),
        (["balance", "--budget-minutes", "-1"], "--budget-minutes -1: should be greater than 0"),
        (["balance", "--budget-minutes", "nan"], "--budget-minutes nan: should be a finite number"),
        (["balance", "--budget-minutes", "inf"], "--budget-minutes inf: should be a finite number"),
        (["balance", "--seeds", "3"], "unrecognized arguments: --seeds"),
    ],
)
def test_what_does_not_go_together_is_one_line(argv: list[str], line: str) -> None:
    with pytest.raises(UserError) as caught:
        study(*argv)
    assert str(caught.value).startswith(line)
    assert "\n" not in str(caught.value)


def test_a_replay_goes_twenty_steps_beyond_its_event_under_all_treatments() -> None:
    arguments = parse(ReplayArguments, ["spiky", "loss-000051"], "replay")
    assert (arguments.run, arguments.event, arguments.after, arguments.treatments) == ("spiky", "loss-000051", 20, [])
    given = parse(ReplayArguments, ["--with", "zclip", "spiky", "1", "--with", "half-lr", "--after", "0"], "replay")
    assert (given.treatments, given.after) == (["zclip", "half-lr"], 0)


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["spiky"], "the following arguments are required"),
        (["spiky", "1", "--after", "-1"], "--after -1: should be greater than or equal to 0"),
        (["spiky", "1", "2"], "unrecognized arguments: 2"),
    ],
)
def test_a_replay_is_of_one_event(argv: list[str], line: str) -> None:
    with pytest.raises(UserError) as caught:
        parse(ReplayArguments, argv, "replay")
    assert str(caught.value).startswith(line)


def test_a_comparison_is_of_two_runs_at_least() -> None:
    assert parse(CompareArguments, ["a", "--out", "x.html", "b"], "compare").runs == ["a", "b"]
    with pytest.raises(UserError, match="a comparison takes at least two runs, not a alone"):
        parse(CompareArguments, ["a"], "compare")
    with pytest.raises(UserError, match="at least two runs, or a sweep: steadymoe compare --sweep latest"):
        parse(CompareArguments, [], "compare")
    assert parse(CompareArguments, ["--sweep", "latest"], "compare").sweep == "latest"
    with pytest.raises(UserError, match="--sweep compares the trials of a sweep; leave out a"):
        parse(CompareArguments, ["a", "--sweep", "latest"], "compare")


def sweep(*argv: str) -> SweepArguments:
    return parse(SweepArguments, argv, "sweep")


def test_what_is_given_in_place_of_the_sweep_s_own_budget() -> None:
    assert sweep("stability").changed == {}
    given = sweep("stability", "--trials", "3", "--budget-minutes", "0.5", "--set", "seed=1")
    assert (given.changed, given.settings) == ({"budget": {"minutes": 0.5, "trials": 3}}, ["seed=1"])
    assert sweep("--resume", "stability-1", "--trials", "9").changed == {"budget": {"trials": 9}}
    assert sweep("stability", "--nested").changed == {"nested": True}
    # Of the same store, where the server is gone.
    uri = "tracking.uri=sqlite:////h/mlflow.db"
    assert sweep("--resume", "stability-1", "--set", uri).settings == [uri]


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["a", "b"], "one sweep at a time; leave out b"),
        (["--resume", "x", "a"], "--resume takes the sweep as it was begun, so no name may be given; leave out a"),
        (["--resume", "x", "--set", "seed=1"], "--set: a sweep that goes on keeps its config"),
        (["--resume", "x", "--print-config"], "--print-config shows what a sweep expands to, so it does not go with"),
        (["--resume", "x", "--nested"], "--nested: a sweep that goes on keeps the kind of its trials; leave it out"),
        (["--trials", "3"], "no sweep given; name one, for example: steadymoe sweep stability"),
        (["a", "--trials", "0"], "--trials 0: should be greater than 0"),
        (["a", "--budget-minutes", "nan"], "--budget-minutes nan: should be a finite number"),
        (["a", "--budget-minutes", "inf"], "--budget-minutes inf: should be a finite number"),
        (["a", "--seeds", "3"], "unrecognized arguments: --seeds"),
    ],
)
def test_what_does_not_go_together_in_a_sweep_is_one_line(argv: list[str], line: str) -> None:
    with pytest.raises(UserError) as caught:
        sweep(*argv)
    assert str(caught.value).startswith(line)
    assert "\n" not in str(caught.value)

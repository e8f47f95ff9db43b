"""Where a replay begins, what applied by then, and what is refused before anything is started."""

from pathlib import Path

import pytest

from pipelines.checkpoint_manifest import FileRecord, Manifest, sha256_of, step_name, write_manifest
from pipelines.checkpoint_standing import mark, pin, take_place
from pipelines.errors import UserError
from pipelines.journal import Journal, LrCut, SkippedSamples
from pipelines.run_folder import RunFolder
from pipelines.spike_event import read_events
from tests.tuning.replayed import add_spike, write_run
from tuning.replay_plan import choose_start, journal_as_of, leads_to, make_plan

SETTINGS = ("schedule.steps=100", "checkpoint.every_steps=20")


def write_checkpoint(folder: RunFolder, step: int, timeline: int = 0) -> Path:
    """One that is whole, with nothing that could be trained on."""
    path = folder.checkpoints / step_name(step)
    path.mkdir(parents=True)
    (path / "rank-00000.safetensors").write_bytes(b"weights")
    record = FileRecord(size=7, sha256=sha256_of(path / "rank-00000.safetensors"))
    manifest = Manifest(
        step=step, timeline=timeline, files={"rank-00000.safetensors": record}, tensors={}, scalars={}, metadata={}
    )
    write_manifest(path, manifest)
    return path


def manifest(step: int, timeline: int) -> Manifest:
    return Manifest(step=step, timeline=timeline, files={}, tensors={}, scalars={}, metadata={})


@pytest.mark.parametrize(
    ("step", "timeline", "event_timeline", "rewinds", "leads"),
    [
        (40, 0, 0, [], True),
        (40, 0, 0, [45], True),  # what was taken back lies after it
        (40, 3, 0, [45], True),  # counted otherwise, after damage for instance; no step before it was ever taken back
        (44, 0, 0, [40], True),  # discarded, and of the event's own timeline
        (44, 1, 0, [40], False),  # saved anew, with what the answer changed
        (44, 0, 1, [40], False),  # taken back before the event came
        (44, 1, 1, [40], True),
        (44, 1, 2, [40, 50, 30], True),
        (44, 1, 3, [40, 50, 30], False),
    ],
)
def test_a_checkpoint_leads_to_an_event_if_no_step_before_it_was_taken_back_in_between(
    tmp_path: Path, step: int, timeline: int, event_timeline: int, rewinds: list[int], leads: bool
) -> None:
    event = add_spike(RunFolder(tmp_path), 60, timeline=event_timeline)
    assert leads_to(event, manifest(step, timeline), rewinds) == leads


def test_a_replay_begins_with_the_pinned_checkpoint_even_if_it_was_discarded(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    write_checkpoint(folder, 20)
    mark(write_checkpoint(folder, 40), "discarded")
    event = add_spike(folder, 45, checkpoint="step-00000040")
    start = choose_start(folder, event, [30])
    assert (start.step, start.says) == (40, "step-00000040")


def test_a_replay_begins_with_the_pinned_checkpoint_even_if_another_has_its_name_now(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    event = add_spike(folder, 45, checkpoint="step-00000040", rewound_to=35)
    pinned = write_checkpoint(folder, 40)
    pin(pinned, event.id)
    take_place(write_checkpoint(folder, 41, timeline=1), pinned)
    start = choose_start(folder, event, [35])
    assert start.manifest is not None
    assert (start.says, start.manifest.timeline) == ("step-00000040-t0", 0)


def test_without_it_a_replay_begins_with_an_older_one_and_says_so(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    event = add_spike(folder, 45, onset=41, checkpoint="step-00000040")
    assert choose_start(folder, event, []).says == "the run's first step (step-00000040 is gone)"
    write_checkpoint(folder, 20)
    assert choose_start(folder, event, []).says == "step-00000020 (step-00000040 is gone)"
    damaged = write_checkpoint(folder, 40) / "rank-00000.safetensors"
    damaged.write_bytes(b"weightx")
    assert choose_start(folder, event, []).says == (
        f"step-00000020 ({damaged} is damaged: its checksum does not match)"
    )
    damaged.write_bytes(b"weights")
    assert choose_start(folder, event, []).step == 40
    late = event.model_copy(update={"onset": 40})
    assert choose_start(folder, late, []).step == 20


def test_the_journal_of_an_event_has_what_was_decided_before_it_and_nothing_later(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    add_spike(folder, 10, action="record")
    add_spike(folder, 30)
    add_spike(folder, 35, action="rewind_lower_lr", rewound_to=25)
    add_spike(folder, 30, action="record", timeline=1)
    add_spike(folder, 40, kind="worker_death", action="restart_workers")
    add_spike(folder, 50, action="rewind_skip_samples", rewound_to=45, timeline=1)
    add_spike(folder, 52, timeline=2)
    cut, skipped = (
        LrCut(from_step=25, factor=0.5, rewarm_steps=3),
        SkippedSamples(from_step=49, rewound_to=40, samples=[7]),
    )
    now = Journal(
        decisions={10: "record", 30: "record", 52: "skip_step"},
        rewinds=[25, 45],
        lr_cuts=[cut],
        skipped_samples=[skipped],
    )
    events = read_events(folder.events)
    seen = [journal_as_of(now, events[:number], event) for number, event in enumerate(events) if event.is_training]
    assert [journal.decisions for journal in seen] == [
        {},
        {10: "record"},
        {10: "record", 30: "skip_step"},
        {10: "record"},
        {10: "record", 30: "record"},
        {10: "record", 30: "record"},
    ]
    assert [journal.lr_cuts for journal in seen] == [[], [], [], [cut], [cut], [cut]]
    assert [journal.skipped_samples for journal in seen] == [[], [], [], [], [], [skipped]]
    assert all(journal.rewinds == [] and journal.open == [] for journal in seen)


def test_an_event_whose_past_is_not_recorded_is_refused(tmp_path: Path) -> None:
    event = add_spike(RunFolder(tmp_path), 30, timeline=2)
    with pytest.raises(UserError, match=r"had gone back 2 times before it, and the events of 0 of these are recorded"):
        journal_as_of(Journal(rewinds=[5, 6]), [], event)


def test_a_plan_ends_after_the_event_or_with_the_schedule_and_leaves_out_what_cannot_act(tmp_path: Path) -> None:
    run = write_run(tmp_path / "spiky", *SETTINGS, "response.rungs=[skip_step]")
    write_checkpoint(run, 40)
    add_spike(run, 48, checkpoint="step-00000040")
    add_spike(run, 95)
    plan = make_plan(run, "1", [], 20, ["monitors.every_steps=0"])
    assert (plan.start.step, plan.until, plan.arms[0].name) == (40, 68, "as-it-was")
    assert plan.left_out.keys() == {"fp32"}
    for arm in plan.arms:
        assert (arm.config.response.kind, arm.config.monitors.every_steps) == ("record", 0)
        assert (arm.config.checkpoint.every_steps, arm.config.validation.every_steps) == (0, 68)
        assert arm.config.schedule == plan.config.schedule
    assert make_plan(run, "loss-000095", ["half-lr", "as-it-was", "half-lr"], 20, []).until == 100
    assert [a.name for a in make_plan(run, "2", ["half-lr", "as-it-was"], 20, []).arms] == ["as-it-was", "half-lr"]


def test_a_run_that_anticipates_after_spikes_alone_is_triggered_by_nothing_in_its_replay(tmp_path: Path) -> None:
    rungs = ("response.rungs=[rewind_anticipate]", "stability.anticipation.kind=triggered")
    run = write_run(tmp_path / "spiky", *SETTINGS, *rungs)
    write_checkpoint(run, 40)
    add_spike(run, 48)
    anticipation = make_plan(run, "1", ["half-lr"], 5, []).arms[0].config.stability.anticipation.model_dump()
    assert all(not 40 <= step < 53 for step in anticipation["at_steps"])


@pytest.mark.parametrize(
    ("event", "names", "settings", "line"),
    [
        ("9", [], [], "event 9: run spiky has no such event; it has 1 (loss-000048), 2 (worker_death-000050)"),
        (
            "2",
            [],
            [],
            "event 2: is one of operations (worker_death), which no step repeats; events of training are loss",
        ),
        ("1", ["halflr"], [], "--with halflr: no such treatment; did you mean half-lr?"),
        ("1", ["fp32"], [], "--with fp32: cannot act here, for precision.compute is fp32"),
        ("1", [], ["lr=1"], "lr: unknown key; did you mean optimizer.lr? (set by --set)"),
        ("1", [], ["schedule.steps=9"], "--set schedule.steps: cannot be set for a replay, for the learning rates"),
        ("1", [], ["validation={every_steps: 3}"], "--set validation: cannot be set for a replay, for the last step"),
    ],
)
def test_a_mistake_is_one_line(tmp_path: Path, event: str, names: list[str], settings: list[str], line: str) -> None:
    run = write_run(tmp_path / "spiky", *SETTINGS)
    add_spike(run, 48)
    add_spike(run, 50, kind="worker_death", action="restart_workers")
    with pytest.raises(UserError) as refused:
        make_plan(run, event, names, 20, settings)
    assert str(refused.value).startswith(line)
    assert "\n" not in str(refused.value)

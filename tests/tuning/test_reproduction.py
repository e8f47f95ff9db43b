"""Whether a replay is the run again, bit for bit; and what is said if it is not."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import pipelines.loop
from moe.batch import BatchSource
from pipelines.config import RunConfig
from pipelines.data import TrainBatches
from pipelines.outcome import Ending
from pipelines.spike_event import read_events
from pipelines.spool import TRAIN, SpoolWriter
from tests.pipelines.test_responder import BadSamples
from tests.tuning.replayed import add_spike, replay, run_of, write_run
from tests.tuning.test_replay_plan import write_checkpoint
from tuning.replay_plan import Plan, make_plan
from tuning.replay_verdict import measure_replay
from tuning.reproduction import compare, steps_of_timeline, what_is_different
from tuning.trial_rank import reset_process

DIGESTS = {"corpus_digest": "a", "tokenizer_sha256": None}
MACHINE = {"cpu": "A", "packages": {"torch": "2.13"}, "git": {"commit": "c", "dirty": False}}
LOSSES = {41: 3.0, 42: 3.1, 43: 9.0}


def record(path: Path, losses: dict[int, float], **more: float) -> Path:
    with SpoolWriter(path) as writer:
        for step, loss in losses.items():
            writer.write(TRAIN, step, {"train/loss": loss, "train/grad_norm": 0.1 + 0.2, "train/lr": 1e-3, **more})
    return path


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    """That of a run whose loss spiked at step 43, three steps after a checkpoint."""
    run = write_run(tmp_path / "spiky", "schedule.steps=100")
    write_checkpoint(run, 40)
    add_spike(run, 43)
    record(run.spool, {40: 2.0, **LOSSES, 44: 3.0})
    return make_plan(run, "1", ["half-lr"], 1, [])


def test_the_same_bits_are_a_reproduction(tmp_path: Path, plan: Plan) -> None:
    found = compare(plan, record(tmp_path / "same", {**LOSSES, 44: 7.0}), ("never told",))
    assert found.is_exact
    assert found.sentence == "reproduced: loss and gradient norm of 3 steps are the run's, bit for bit"


@pytest.mark.parametrize(
    ("losses", "line"),
    [
        ({**LOSSES, 42: 3.1000000000000005}, "at step 42 train/loss is 3.1000000000000005 where the run had 3.1"),
        ({41: 3.0, 42: 3.1}, "the replay ended before step 43"),
        ({**LOSSES, 43: float("nan")}, "at step 43 train/loss is not finite where the run had 9.0"),
    ],
)
def test_the_first_bit_that_differs_is_named(tmp_path: Path, plan: Plan, losses: dict[int, float], line: str) -> None:
    found = compare(plan, record(tmp_path / "other", losses), ("the text has changed",))
    assert not found.is_exact
    assert found.sentence == f"not reproduced: {line}. What is known to be different: the text has changed"


def test_what_differs_without_a_known_reason_says_that_too(tmp_path: Path, plan: Plan) -> None:
    found = compare(plan, record(tmp_path / "other", {**LOSSES, 41: 2.0}), ())
    assert found.sentence.endswith("What is known to be different: nothing that is recorded says why")


def test_another_learning_rate_is_told(tmp_path: Path, plan: Plan) -> None:
    other = record(tmp_path / "other", {**LOSSES, 42: 2.0}, **{"train/lr": 5e-4})
    (reason,) = compare(plan, other, ()).reasons
    assert reason.startswith("the step's learning rate was 0.001, and is 0.0005")


def test_steps_are_those_of_the_event_s_own_timeline(tmp_path: Path) -> None:
    with SpoolWriter(tmp_path / "spool") as writer:
        for losses, back in (({1: 1.0, 2: 2.0, 3: 9.0}, 1), ({2: 2.5, 3: 3.5, 4: 9.5}, 2), ({3: 4.5}, None)):
            for step, loss in losses.items():
                writer.write(TRAIN, step, {"train/loss": loss})
            if back is not None:
                writer.rewind(back)
    seen = [steps_of_timeline(tmp_path / "spool", timeline) for timeline in range(3)]
    assert [{step: r.metrics["train/loss"] for step, r in steps.items()} for steps in seen] == [
        {1: 1.0, 2: 2.0, 3: 9.0},
        {1: 1.0, 2: 2.5, 3: 3.5, 4: 9.5},
        {1: 1.0, 2: 2.5, 3: 4.5},
    ]


@pytest.mark.parametrize(
    ("now", "reasons"),
    [
        ({}, []),
        ({"packages": {"torch": "2.14"}}, ["torch was 2.13, and is 2.14"]),
        ({"cpu": "B"}, ["the processor was A, and is B"]),
        ({"git": {"commit": "d", "dirty": False}}, ["the commit of this project was c, and is d"]),
        ({"git": {"commit": "c", "dirty": True}}, ["the code had changes that were not committed"]),
    ],
)
def test_a_difference_of_machines_is_a_reason(plan: Plan, now: dict[str, Any], reasons: list[str]) -> None:
    assert list(what_is_different(plan, DIGESTS, MACHINE, {**MACHINE, **now}, gpu=False)) == reasons


def test_settings_and_gpus_are_reasons(plan: Plan) -> None:
    given = make_plan(plan.run, "1", ["half-lr"], 1, ["monitors.every_steps=0", "optimizer.beta2=0.9"])
    assert what_is_different(given, DIGESTS, MACHINE, MACHINE, gpu=True) == (
        "--set changes monitors.every_steps",
        "--set changes optimizer.beta2",
        "kernels of GPUs may add in no fixed order",
    )


RUN = (
    *("schedule.steps=60", "checkpoint.every_steps=6", "checkpoint.confirm_steps=5", "validation.every_steps=30"),
    *("response.calm_steps=5", "response.rungs=[rewind_lower_lr, skip_step, rewind_skip_samples]"),
)


@pytest.fixture
def spoiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Makes the samples of some steps noise, whenever they are read."""
    monkeypatch.setenv("STEADYMOE_HOME", str(tmp_path / "home"))

    def spoil(*steps: int) -> None:
        def bad(batches: TrainBatches, config: RunConfig) -> BatchSource:
            return BadSamples(batches, config, steps)

        monkeypatch.setattr(pipelines.loop, "with_faults", bad)

    yield spoil
    reset_process()


@pytest.mark.slow
def test_events_before_and_after_answers_are_repeated_bit_for_bit_and_skipping_avoids_them(
    tmp_path: Path, spoiled: Callable[..., None]
) -> None:
    """Each with what had been answered by then: nothing, a lower rate, a refused step, samples left out."""
    spoiled(38, 52)
    run = run_of(tmp_path / "spiky", *RUN)
    events = read_events(run.events)
    assert [(event.step, event.action, event.timeline) for event in events] == [
        (38, "rewind_lower_lr", 0),
        (38, "skip_step", 1),
        (52, "rewind_lower_lr", 1),
        (52, "skip_step", 2),
    ]
    for number, event in enumerate(events, 1):
        plan = make_plan(run, str(number), ["skip-samples"], 3, [])
        # The newest before the event, although the steps to it were taken back and its place is another's by now.
        assert plan.start.says.removesuffix(f"-t{event.timeline}") == event.checkpoint
        assert plan.start.step == (event.step - 1) // 6 * 6
        plain, skipping = (replay(plan, arm, tmp_path / f"{event.id}-{arm.name}") for arm in plan.arms)
        found = compare(plan, plain.spool, ())
        assert found.is_exact, found.sentence
        assert found.steps == event.step - plan.start.step > 0
        assert [(e.step, e.kind, e.value) for e in read_events(plain.events)] == [(event.step, "loss", event.value)]
        assert read_events(skipping.events) == []
        assert max(steps_of_timeline(plain.spool, 0)) == plan.until


@pytest.mark.slow
def test_a_gradient_that_was_not_finite_is_so_again_and_has_diverged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STEADYMOE_HOME", str(tmp_path / "home"))
    run = run_of(
        tmp_path / "spiky", "schedule.steps=24", "checkpoint.every_steps=10", "faults=[{kind: nan_gradient, step: 18}]"
    )
    plan = make_plan(run, "1", ["half-lr"], 3, [])
    assert (plan.event.kind, plan.start.step) == ("non_finite", 10)
    plain = replay(plan, plan.arms[0], tmp_path / "plain", outcome="diverged")
    assert compare(plan, plain.spool, ()).is_exact
    found = measure_replay(plan, plain, Ending("diverged", 18))
    assert (found.diverged, found.events, found.val_loss) == (True, 1, None)

"""Anticipatory routing on two ranks: the same training as in one process, and a queue that any division takes up."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from moe.schedule import Moment
from moe.stability.technique import Choose
from pipelines import checkpoints
from tests.distributed import run_distributed
from tests.moe.divisions import (
    DIVISIONS,
    Cases,
    Run,
    assert_same_training,
    by_corner,
    reference,
    resumed,
    runs_of,
    train,
    whole_state,
)
from tests.moe.tiny import MTP, PADDED, relative_difference, tiny_config, tiny_trainer, weights

ALWAYS: dict[str, Any] = {"stability": {"anticipation": {"kind": "always", "lag": 2}}}
TRIGGERED: dict[str, Any] = {
    "stability": {"anticipation": {"kind": "triggered", "lag": 2, "steps": 3, "at_steps": [1]}},
}
STAGES: dict[str, Any] = {
    "monitors": {"every_steps": 0},
    "schedule": {
        "kind": "stages",
        "stages": [
            {"steps": 2, "lr": {"kind": "linear"}, "global_batch_size": 4, "sequence_length": 8},
            {"steps": 1, "global_batch_size": 12, "sequence_length": 8},
            {"steps": 6},
        ],
    },
}
CASES: Cases = {"always": [ALWAYS], "triggered": [TRIGGERED], "stages": [ALWAYS, STAGES]}
FIGURES = ("moe/anticipation_lag", "moe/stale_share", "train/loss", "train/grad_norm")


@pytest.fixture(scope="module")
def alone() -> dict[str, Run]:
    return reference(CASES)


def test_the_reference_trains_on_choices_that_today_would_be_others(alone: dict[str, Run]) -> None:
    lags = {name: [m.get("moe/anticipation_lag") for m in run.metrics] for name, run in alone.items()}
    assert lags == {"always": [0, 1, 2, 2, 2], "triggered": [None, 0, 1, 2, None], "stages": [0, 1, 2, 2, 2]}
    for run in alone.values():
        stale = [m["moe/stale_share"] for m in run.metrics if m.get("moe/anticipation_lag")]
        assert min(stale[1:]) > 0.01


SLOW = pytest.mark.slow


@by_corner
def test_ranks_train_what_one_process_trains(alone: dict[str, Run], division: str) -> None:
    """The queue among it: ids of every token, in the order of the global batch."""
    runs = runs_of(CASES, division)
    assert_same_training(runs, alone, {})
    for name, run in alone.items():
        ids = "stability.anticipation.ids"
        assert run.state[ids].any()
        assert torch.equal(runs[0][name].state[ids], run.state[ids])


def fill_alone(before_forward: Callable[[Choose, Moment], Any], choose: Choose, moment: Moment) -> None:
    before_forward(choose, moment)


def bytes_sent(rank: int, world: int) -> list[list[float]]:
    """Per step, without anticipation and with a queue of choices that no step takes."""
    found = []
    for changes in ({}, ALWAYS):
        config = tiny_config(MTP, changes, {"parallel": {"workers": world, "expert_parallel": world}})
        trainer = tiny_trainer(config)
        technique = trainer.techniques["anticipation"]
        technique.before_forward = partial(fill_alone, technique.before_forward)  # type: ignore[method-assign]
        metrics = [trainer.step().metrics for _ in range(3)]
        found.append([m["train/ep_bytes_per_token"] + m["train/ep_metadata_bytes_per_token"] for m in metrics])
    return found


def test_bytes_on_the_wire_are_those_of_training() -> None:
    [without, with_queue], _ = run_distributed(bytes_sent, 2)
    assert without == with_queue
    assert min(without) > 0


@pytest.mark.slow
def test_the_state_continues_bit_for_bit() -> None:
    for broken in run_distributed(resumed, 2, CASES, DIVISIONS["ep2-sharded"], (1, 2, 4), timeout_s=240):
        assert broken == []


def save_and_go_on(
    rank: int, world: int, changes: list[Any], parallel: dict[str, Any], after: int, folder: Path
) -> Any:
    """Train, save, and train on: (whole state when saved, figures of the steps after, weights at the end)."""
    trainer = tiny_trainer(tiny_config(MTP, {"parallel": {"workers": world, **parallel}}, *changes), PADDED)
    for _ in range(after):
        trainer.step()
    checkpoints.save(folder, trainer.state(), step=after, metadata={})
    return whole_state(trainer), [trainer.step().metrics for _ in range(3)], weights(trainer)


def take_up(rank: int, world: int, changes: list[Any], parallel: dict[str, Any], after: int, folder: Path) -> Any:
    """The same, from the checkpoint, in a trainer that has trained something else."""
    config = tiny_config(MTP, {"parallel": {"workers": world, **parallel}, "seed": 99}, *changes)
    trainer = tiny_trainer(config, PADDED)
    trainer.step()
    restored = checkpoints.load(checkpoints.newest_valid(folder) or folder, trainer.state())
    trainer.restore(restored["scalars"])
    return whole_state(trainer), [trainer.step().metrics for _ in range(3)], weights(trainer)


ONE, PAIR, SHARDED = (1, "replicas"), (2, "ep2"), (2, "ep2-sharded")


@pytest.mark.parametrize(
    ("changes", "after", "before", "later"),
    [
        pytest.param([ALWAYS], 1, ONE, SHARDED, id="ramp to 2", marks=SLOW),
        pytest.param([TRIGGERED], 3, ONE, SHARDED, id="triggered to 2", marks=SLOW),
        pytest.param([ALWAYS, STAGES], 2, ONE, SHARDED, id="stages to 2"),
        pytest.param([TRIGGERED], 3, PAIR, ONE, id="triggered to 1", marks=SLOW),
        pytest.param([ALWAYS, STAGES], 2, PAIR, ONE, id="stages to 1", marks=SLOW),
    ],
)
def test_another_division_takes_the_queue_up_in_ramp_steady_state_triggered_period_and_stages(
    changes: list[Any], after: int, before: tuple[int, str], later: tuple[int, str], tmp_path: Path
) -> None:
    run = run_distributed(save_and_go_on, before[0], changes, DIVISIONS[before[1]], after, tmp_path)
    taken_up = run_distributed(take_up, later[0], changes, DIVISIONS[later[1]], after, tmp_path)
    state, figures, end = run[0]
    for got_state, got_figures, got_end in taken_up:
        assert got_state.keys() == state.keys()
        assert all(torch.equal(got_state[name], tensor) for name, tensor in state.items())
        assert any(metrics.get("moe/stale_share", 0) > 0 for metrics in figures)
        for got, want in zip(got_figures, figures, strict=True):
            compared = [{name: m.get(name, -1) for name in FIGURES} for m in (got, want)]
            assert compared[0] == pytest.approx(compared[1], rel=1e-5)
        assert all(relative_difference(got_end[name], weight) < 1e-5 for name, weight in end.items())


@pytest.mark.slow
def test_four_ranks_train_what_one_process_trains(alone: dict[str, Run]) -> None:
    runs = run_distributed(
        train, 4, {n: [*c, {"data": {"micro_batch_size": 1}}] for n, c in CASES.items()}, {"expert_parallel": 2},
        timeout_s=240,
    )  # fmt: skip
    assert_same_training(runs, alone, {})

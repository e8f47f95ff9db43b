"""The preset ``chaos`` as a user runs it: whatever goes wrong is recorded, answered, and leaves no trace."""

from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient
from safetensors.torch import load_file

from pipelines.fault_config import (
    BitFlipConfig,
    CorruptedBatchesConfig,
    DeadTrackingServerConfig,
    FaultConfig,
    FullDiskConfig,
)
from pipelines.loading import load_config
from pipelines.run_folder import RunFolder, read_json
from pipelines.spike_event import Kind, SpikeEvent, read_events
from pipelines.spool import VALIDATION
from tests.pipelines.driver import folders, run_steadymoe
from tests.pipelines.small_run import metrics_of

pytestmark = pytest.mark.slow

KINDS: dict[str, set[Kind]] = {
    "corrupted_batch": {"loss", "grad_norm"},
    "weight_scaled": {"loss"},
    "activation_outlier": {"loss"},
    "bit_flip": {"loss", "grad_norm", "non_finite"},
    "nan_gradient": {"non_finite"},
    "lr_jump": {"loss"},
    "router_collapse": {"max_vio"},
    "dead_tracking_server": {"tracking_outage"},
    "full_disk": {"checkpoint_failed"},
    "killed_worker": {"worker_death"},
    "stalled_worker": {"worker_stall"},
    "corrupt_checkpoint": {"worker_death", "checkpoint_damaged"},
}
"""What each fault must be recorded as: one of these, the last as both."""

# A driver that asks every second, and a machine that is busy.
NOTICED_S = 4.0


def _kinds(fault: FaultConfig) -> set[Kind]:
    is_copied = isinstance(fault, BitFlipConfig) and fault.target == "weight" and fault.group == "dense"
    return {"replica_mismatch"} if is_copied else KINDS[fault.kind]


def _is_invisible(fault: FaultConfig) -> bool:
    return isinstance(fault, BitFlipConfig) and fault.bit == 0


def _is_of(event: SpikeEvent, fault: FaultConfig, run: RunFolder, checkpoint_every: int) -> bool:
    """Whether an event is where and when a fault must be noticed."""
    if event.kind not in _kinds(fault) or _is_invisible(fault):
        return False
    assert not isinstance(fault, CorruptedBatchesConfig)
    step: int = fault.step
    if isinstance(fault, DeadTrackingServerConfig):
        began_ms: float = read_json(run.cut_off)["until_ms"] - 1000 * fault.seconds
        return 0 <= event.time_ms - began_ms < 1000 * NOTICED_S
    if isinstance(fault, FullDiskConfig):
        step += -step % checkpoint_every  # nobody can know before a checkpoint is due
    # Of operations the last step that was done, of training the one that went wrong.
    return step - (not event.is_training) <= event.step <= step + 2


def test_each_fault_is_recorded_and_answered_and_the_run_ends_as_good_as_an_undisturbed_one(home: Path) -> None:
    for name, more in (("undisturbed", "faults=[]"), ("disturbed", "checkpoint.keep=99")):
        run_steadymoe(home, "train", "chaos", "--set", f"tracking.run_name={name}", "--set", more)
    config = load_config(["chaos"], [])
    run, undisturbed = folders()["disturbed"], folders()["undisturbed"]
    assert read_events(undisturbed.events) == []

    events = read_events(run.events)
    of_faults = [[e for e in events if _is_of(e, fault, run, config.checkpoint.every_steps)] for fault in config.faults]
    missed = [fault for fault, found in zip(config.faults, of_faults, strict=True) if not found]
    assert [_is_invisible(fault) for fault in missed] == [True]
    assert {event.kind for event in of_faults[-1]} == {"worker_death", "checkpoint_damaged"}
    assert [event for event in events if not any(event in found for found in of_faults)] == []
    assert "record" not in {event.action for event in events}
    for found in of_faults:
        states = [event.outcome.state if event.outcome else None for event in found]
        assert set(states[:-1]) <= {"relapsed", "recovered"}  # the first answer is the mildest
        assert states[-1:] in ([], ["recovered"])

    tracked = MlflowClient(f"sqlite:///{home / 'mlflow.db'}").get_run(run.info.id)
    assert (tracked.info.status, tracked.data.tags["restarts"]) == ("FINISHED", "3")
    losses = [metrics_of(folder.path, VALIDATION)[config.steps]["val/loss"] for folder in (run, undisturbed)]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)

    saved = [load_file(file) for file in run.checkpoints.glob("step-*/*.safetensors")]
    assert len(saved) > 2 * (config.steps // config.checkpoint.every_steps - 3)
    assert all(bool(torch.isfinite(tensor).all()) for tensors in saved for tensor in tensors.values())

"""From the faults of a config to the hooks that a trainer gets."""

from collections.abc import Callable
from typing import Any

from moe.hooks import StepHook
from moe.trainer import Trainer
from pipelines import fault_config as c
from pipelines.config import RunConfig
from pipelines.faults import operations, training
from pipelines.faults.once import FaultHook, FaultRecord, Scene
from pipelines.run_folder import RunFolder

HOOKS: dict[type[Any], Callable[[Any, Scene], FaultHook]] = {
    c.WeightScaledConfig: training.WeightScaled,
    c.ActivationOutlierConfig: training.ActivationOutlier,
    c.BitFlipConfig: training.BitFlip,
    c.NanGradientConfig: training.NanGradient,
    c.LrJumpConfig: training.LrJump,
    c.RouterCollapseConfig: training.RouterCollapse,
    c.KilledWorkerConfig: operations.KilledWorker,
    c.StalledWorkerConfig: operations.StalledWorker,
    c.DeadTrackingServerConfig: operations.DeadTrackingServer,
    c.FullDiskConfig: operations.FullDisk,
    c.CorruptCheckpointConfig: operations.CorruptCheckpoint,
}
"""Every fault but those that are bad text, which `pipelines.faults.batches` lays over the batches."""


def fault_hooks(config: RunConfig, trainer: Trainer, folder: RunFolder) -> list[StepHook]:
    """The faults of ``config`` that happen to a trainer, in their order. Collective; every rank needs all of them.

    Raises:
        UserError: a pattern matches no parameter, or the record of faults that have happened is damaged.
    """
    wanted = [(number, fault) for number, fault in enumerate(config.faults) if type(fault) in HOOKS]
    if not wanted:
        return []
    record = FaultRecord(folder, trainer.ranks)
    return [HOOKS[type(f)](f, Scene(number, config.seed, trainer, folder, record)) for number, f in wanted]

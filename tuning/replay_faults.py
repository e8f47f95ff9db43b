"""Faults of a run in its replay: which happen again, and which do not. Imports no torch.

A fault that happens once in a run happens again where it lies on the way to the event. It does not if it had been taken
back with its step when the event came; nor if it is one of operations, which no figure of training depends on.
"""

from collections.abc import Sequence

from pipelines.config import RunConfig
from pipelines.fault_config import OPERATIONS
from pipelines.run_folder import RunFolder, write_json
from pipelines.spike_event import SpikeEvent

_OF_CHECKPOINTS = frozenset({"full_disk", "corrupt_checkpoint"})


def needs_checkpoints(config: RunConfig) -> bool:
    """Whether the config holds only with checkpoints, for faults of it are about them."""
    return any(str(fault.kind) in _OF_CHECKPOINTS for fault in config.faults)


def faults_left_out(config: RunConfig, before: Sequence[SpikeEvent]) -> list[int]:
    """Places in ``faults`` of those that must not happen in the replay of an event; ``before`` came before it."""
    rewinds = [(event.rewound_to, event.step) for event in before if event.is_training and event.rewound_to is not None]
    left_out = []
    for number, fault in enumerate(config.faults):
        step = getattr(fault, "step", None)
        taken_back = step is not None and any(target < step <= last for target, last in rewinds)
        if str(fault.kind) in OPERATIONS or taken_back:
            left_out.append(number)
    return left_out


def fault_cut_by(config: RunConfig, start: int) -> int | None:
    """The place of a fault that lasted over the step that the replay begins with, and does not go on in it."""
    for number, fault in enumerate(config.faults):
        step, steps = getattr(fault, "step", None), getattr(fault, "steps", 1)
        if step is not None and step <= start < step - 1 + steps and str(fault.kind) not in OPERATIONS:
            return number
    return None


def write_faults(folder: RunFolder, config: RunConfig, left_out: Sequence[int]) -> None:
    """Let the run in ``folder`` take these faults for ones that have happened already."""
    if left_out:
        happened = [{"number": n, "kind": config.faults[n].kind, "step": 0} for n in left_out]
        write_json(folder.faults, {"happened": happened})

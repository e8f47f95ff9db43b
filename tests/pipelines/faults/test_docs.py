"""The table of faults and the preset that runs through them."""

from itertools import pairwise
from pathlib import Path
from typing import get_args

from pipelines.fault_config import CorruptedBatchesConfig, FaultConfig
from pipelines.loading import load_config

TABLE = (Path(__file__).parents[3] / "docs" / "faults.md").read_text(encoding="utf-8")
KINDS = {cls.model_fields["kind"].default for cls in get_args(get_args(FaultConfig)[0])}


def test_every_fault_has_a_row() -> None:
    rows = {line.split("`")[1] for line in TABLE.splitlines() if line.startswith("| `")}
    assert rows == KINDS


def test_chaos_has_every_fault_that_happens_once_each_far_from_the_last() -> None:
    config = load_config(["chaos"], [])
    assert {fault.kind for fault in config.faults} == KINDS - {"corrupted_batches"}
    steps = [fault.step for fault in config.faults if not isinstance(fault, CorruptedBatchesConfig)]
    assert len(steps) == len(config.faults)
    response = config.response
    assert response.kind == "ladder"
    assert min(b - a for a, b in pairwise(steps)) > response.calm_steps
    assert (config.parallel.workers, config.parallel.expert_parallel) == (2, 2)
    assert config.monitors.replicas_every_steps == 1

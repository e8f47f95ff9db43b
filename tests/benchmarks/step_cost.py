"""What switches cost: the time of an optimizer step with each of them, against that of a step without.

    python -m tests.benchmarks.step_cost [ROUNDS] [NAME ...]

One process and one thread, the size of preset tiny with a vocabulary of 2048, random tokens. Switches take turns step
by step, in an order that turns as well, so that all see the same machine. A row is a switch: the median of its steps in
milliseconds, and the median, with quartiles, of its ratios to the step of its yardstick in the same round.
"""

import sys
import time
from dataclasses import dataclass
from statistics import median, quantiles

import torch

from moe.batch import Batch
from moe.config.trainer import TrainerConfig
from moe.parallel import join
from moe.trainer import Trainer
from pipelines.loading import load_config

_VOCABULARY = 2048
# The queue of anticipatory routing fills, buffers get their sizes.
_UNTIMED = 6

_IDENTITY = "model.moe={top_k: 3, num_identity_experts: 8, experts_per_token: 2.0}"
_GROUPS = "model.moe={num_groups: 4, top_groups: 2}"
_FP8 = "precision.fp8.kind=deepseek_v3"


@dataclass(frozen=True)
class Switch:
    """Settings, and the name of what they are compared with."""

    settings: tuple[str, ...]
    yardstick: str = "plain"


SWITCHES = {
    "plain": Switch(()),
    "anticipation": Switch(("stability.anticipation={kind: always, lag: 4}",)),
    "identity": Switch((_IDENTITY, "stability.balance={kind: budget}")),
    "threshold": Switch(("model.moe.selection.kind=threshold", "stability.balance={kind: threshold}")),
    "hash": Switch(("model.moe.hash_layers=3",)),
    "domains": Switch(("model.moe.bias_domains=2", "data.domains=[['test/*']]")),
    "groups": Switch((_GROUPS,)),
    "groups-unbiased": Switch((_GROUPS, "model.moe.group_score=unbiased"), "groups"),
    "nodes": Switch(("parallel.expert_nodes=8",)),
    "qk-clip": Switch(("stability.qk_clip.kind=max_logit",)),
    "muon": Switch(("optimizer={kind: muon}",)),
    "muon-bf16": Switch(("optimizer={kind: muon, newton_schulz_dtype: bf16}",), "muon"),
    "hyper": Switch(("model.residual.kind=hyper",)),
    "mhc": Switch(("model.residual.kind=mhc",)),
    "bf16": Switch(("precision.compute=bf16",)),
    "fp8": Switch((_FP8,)),
    "fp8-bf16": Switch((_FP8, "precision.compute=bf16"), "bf16"),
    "fp8-tensor": Switch((_FP8, "precision.fp8.scaling=tensor"), "fp8"),
    "fp8-e5m2": Switch((_FP8, "precision.fp8.gradients=e5m2"), "fp8"),
    "fp8-dispatch": Switch((_FP8, "precision.fp8.dispatch=true"), "fp8"),
    "fp8-power-of-two": Switch((_FP8, "precision.fp8.scales=power_of_two"), "fp8"),
}


def _trainer(switch: Switch) -> Trainer:
    fixed = ("parallel.workers=1", "parallel.expert_parallel=1", "parallel.device=cpu", "monitors.every_steps=0",
             f"model.vocab_size={_VOCABULARY}", "schedule.steps=100000")  # fmt: skip
    config: TrainerConfig = load_config(["tiny"], [*fixed, *switch.settings])

    def batches(step: int) -> list[Batch]:
        generator = torch.Generator().manual_seed(step)
        shape = (config.data.global_batch_size, config.data.sequence_length + 1)
        ids = (torch.rand(shape, generator=generator) ** 3 * _VOCABULARY).long()
        domains_B = torch.arange(len(ids)) % config.model.moe.bias_domains
        return [Batch(ids, domains_BL=domains_B.unsqueeze(1).expand_as(ids))]

    return Trainer(config, join(config.parallel), batches)


def _milliseconds(trainer: Trainer) -> float:
    clock = time.perf_counter()
    trainer.step()
    return 1e3 * (time.perf_counter() - clock)


def main(rounds: int, names: list[str]) -> None:
    """Time the switches of these names, and what they are compared with."""
    wanted = [name for name in SWITCHES if not names or name in names]
    timed = [n for n in SWITCHES if n in {"plain", *wanted, *(SWITCHES[name].yardstick for name in wanted)}]
    torch.set_num_threads(1)
    trainers = {name: _trainer(SWITCHES[name]) for name in timed}
    times: dict[str, list[float]] = {name: [] for name in timed}
    for number in range(_UNTIMED + rounds):
        turn = number % len(timed)
        for name in timed[turn:] + timed[:turn]:
            milliseconds = _milliseconds(trainers[name])
            if number >= _UNTIMED:
                times[name].append(milliseconds)
        print(f"\rround {number + 1} of {_UNTIMED + rounds}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    for name in wanted:
        yardstick = SWITCHES[name].yardstick
        low, middle, high = quantiles(
            [mine / other for mine, other in zip(times[name], times[yardstick], strict=True)], n=4
        )
        print(f"{name:16} {median(times[name]):7.1f} ms  {middle:.3f} ({low:.3f} to {high:.3f}) of {yardstick}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 30, sys.argv[2:])

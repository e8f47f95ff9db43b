"""Any division of the ranks trains the same model: one process is the reference, the batch is the same throughout."""

import functools
import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from moe.layers.router import Routing
from moe.schedule import Timeline
from moe.trainer import Trainer
from tests.distributed import run_distributed
from tests.moe.tiny import global_batch, gradients, relative_difference, tiny_config, tiny_trainer, weights

STEPS = 5
PADDED = (1, 3)

MODELS: dict[str, dict[str, Any]] = {
    # DeepSeek-V3's shape with every switch on; the clip acts at every step (asserted below).
    "v3": {"model": {"mtp": {"depth": 1}, "moe": {"num_groups": 4, "top_groups": 2, "top_k": 3}}},
    # An ancestor: plain attention, softmax affinities that are not normalised, nothing that balances or clips.
    "v1": {
        "model": {
            "attention": {"kind": "mha", "num_heads": 2, "head_dim": 8},
            "moe": {
                "affinity": "softmax",
                "normalize_gates": False,
                "num_shared_experts": 2,
                "routed_scaling_factor": 2.5,
            },
        },
        "stability": {"balance": {"kind": "none"}, "balance_loss": {"kind": "none"}, "clip": {"kind": "none"}},
    },
}
# A ramp of batch and sequence length, with techniques that change on the way.
MODELS["v3-staged"] = {
    **MODELS["v3"],
    # Measured where a stage begins, of one micro-batch, and micro-batches differ here.
    "monitors": {"every_steps": 0},
    "schedule": {
        "kind": "stages",
        "stages": [
            {"steps": 2, "lr": {"kind": "linear"}, "global_batch_size": 4, "sequence_length": 8},
            {"steps": 2, "bias_update_rate": 0.02, "balance_coefficient": 0.05, "clip_max_norm": 0.1},
            {"steps": 1, "global_batch_size": 12, "bias_update_rate": 0.0},
        ],
    },
}
# Routing as the test forces it. The balance loss counts its own choice of experts, which cannot be forced.
MODELS["v3-forced"] = {**MODELS["v3"], "stability": {"balance_loss": {"kind": "none"}}}


@dataclass(frozen=True)
class Tolerance:
    """Largest relative difference; a tensor's is that of its L2 norm."""

    figures: float
    gradients: float
    weights: float


FP32 = Tolerance(figures=1e-5, gradients=1e-5, weights=1e-5)
# bf16 rounds to 4e-3 at every product. Measured: 2.5e-3, 2e-2 and 1.4e-3, as much as one process differs from fp32.
BF16 = Tolerance(figures=1e-2, gradients=4e-2, weights=4e-3)


@dataclass
class Step:
    taken: bool
    metrics: dict[str, float]
    gradients: dict[str, torch.Tensor]
    remote_pairs: int
    """Distinct (token of this rank, other rank that holds one of its experts) pairs, over all layers."""


@dataclass
class Run:
    steps: list[Step]
    weights: dict[str, torch.Tensor]


def remote_pairs(routing: Routing, trainer: Trainer) -> int:
    """Counted token by token from the expert ids alone; identity experts and missing choices are nowhere."""
    experts = trainer.config.model.moe.num_experts
    per_rank = experts // trainer.config.parallel.expert_parallel
    me = trainer.ranks.rank % trainer.config.parallel.expert_parallel
    return sum(
        len({expert // per_rank for expert in token if 0 <= expert < experts} - {me})
        for token in routing.ids_TK.tolist()
    )


def force_routing(trainer: Trainer) -> None:
    """Let a token's experts depend on the token alone: in bf16 a rounding would decide near ties."""
    c = trainer.config.model
    assert c.vocab_size is not None
    generator = torch.Generator().manual_seed(7)
    scores = torch.rand(len(trainer.routers), c.vocab_size, c.moe.num_experts, generator=generator)
    table = scores.topk(c.moe.top_k, dim=-1).indices
    current: dict[str, torch.Tensor] = {}

    def remember(module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        current["ids"] = args[0].ids_BL[:, : trainer.config.data.sequence_length].flatten()

    trainer.model.register_forward_pre_hook(remember)
    for layer, router in enumerate(trainer.routers):
        router.select = lambda *_, layer=layer: table[layer][current["ids"]]  # type: ignore[method-assign]


def train(rank: int, world: int, changes: list[dict[str, Any]], forced: bool) -> Run:
    """Five steps on this rank, two of them with padding."""
    config = tiny_config(*changes)
    trainer = tiny_trainer(config, PADDED)
    if forced:
        force_routing(trainer)
    pairs = 0

    def count(module: torch.nn.Module, args: Any, routing: Routing) -> None:
        nonlocal pairs
        pairs += remote_pairs(routing, trainer)

    for router in trainer.routers:
        router.register_forward_hook(count)
    steps = []
    for _ in range(STEPS):
        pairs = 0
        report = trainer.step()
        steps.append(Step(report.taken, report.metrics, gradients(trainer), pairs))
    return Run(steps, weights(trainer))


def changes_for(
    model: str, world: int, parallel: dict[str, Any], micro: int | None, compute: str
) -> list[dict[str, Any]]:
    return [
        MODELS[model],
        {"parallel": {"workers": world, **parallel}},
        {"data": {"micro_batch_size": micro}, "precision": {"compute": compute}},
    ]


@functools.cache
def reference(model: str, compute: str, forced: bool = False) -> Run:
    """One process, the whole batch at once."""
    [run] = run_distributed(train, 1, changes_for(model, 1, {}, None, compute), forced)
    assert isinstance(run, Run)
    return run


def assert_same_training(runs: list[Run], expected: Run, tolerance: Tolerance) -> None:
    for number in range(STEPS):
        ranks, want = [run.steps[number] for run in runs], expected.steps[number]
        got = ranks[0]
        assert all(step.metrics == got.metrics for step in ranks), "ranks report different figures"
        assert got.taken
        assert want.taken
        for name, value in want.metrics.items():
            if "bytes" not in name:
                assert got.metrics[name] == pytest.approx(value, rel=tolerance.figures, abs=1e-9), (number, name)
        assert got.gradients.keys() == want.gradients.keys()
        for name, gradient in want.gradients.items():
            assert gradient.norm() > 0, name
            assert relative_difference(got.gradients[name], gradient) < tolerance.gradients, (number, name)
    for name, weight in expected.weights.items():
        if name.endswith("expert_bias_E"):
            assert torch.equal(runs[0].weights[name], weight), name
        else:
            assert relative_difference(runs[0].weights[name], weight) < tolerance.weights, name


def assert_norms_are_those_of_the_whole_gradients(run: Run) -> None:
    """Counts every value once, whatever holds it. The step has clipped the gradients after measuring them."""
    for step in run.steps:
        factor = step.metrics.get("train/clip_factor", 1.0)
        squares = {"dense": 0.0, "router": 0.0, "experts": 0.0}
        for name, gradient in step.gradients.items():
            group = "experts" if ".experts." in name else "router" if ".router." in name else "dense"
            squares[group] += float(gradient.double().square().sum())
        for group, square in squares.items():
            assert step.metrics[f"grad_norm/{group}"] * factor == pytest.approx(math.sqrt(square), rel=1e-5)
        assert step.metrics["train/grad_norm"] * factor == pytest.approx(math.sqrt(sum(squares.values())), rel=1e-5)


def assert_bytes_are_the_lower_bound(runs: list[Run], changes: list[dict[str, Any]]) -> None:
    """One vector per distinct remote (token, rank) pair and pass: dispatch and combine, forward and backward."""
    config = tiny_config(*changes)
    element = {"fp32": 4, "bf16": 2}[config.precision.compute]
    for number in range(STEPS):
        batch = global_batch(config, number, padded=number in PADDED)
        length = Timeline(config).at(number).sequence_length
        real = torch.ones_like(batch.ids_BL, dtype=torch.bool) if batch.real_BL is None else batch.real_BL
        tokens = int((real[:, :length] & real[:, 1 : length + 1]).sum())
        pairs = sum(run.steps[number].remote_pairs for run in runs)
        metrics = runs[0].steps[number].metrics
        bound = pairs * config.model.hidden_size * element * 4
        assert metrics["train/ep_bytes_per_token"] * tokens == pytest.approx(bound)
        assert (pairs > 0) == (metrics["train/ep_metadata_bytes_per_token"] > 0)


def check(
    model: str,
    world: int,
    parallel: dict[str, Any],
    micro: int | None,
    compute: str = "fp32",
    tolerance: Tolerance = FP32,
) -> None:
    forced = model == "v3-forced"
    changes = changes_for(model, world, parallel, micro, compute)
    runs = run_distributed(train, world, changes, forced, timeout_s=120)
    assert_same_training(runs, reference(model, compute, forced), tolerance)
    assert_norms_are_those_of_the_whole_gradients(runs[0])
    assert_bytes_are_the_lower_bound(runs, changes)


def test_the_reference_exercises_what_is_compared() -> None:
    run = reference("v3", "fp32")
    assert all(step.metrics["train/clip_factor"] < 0.9 for step in run.steps)
    assert run.steps[-1].metrics["train/loss"] < run.steps[0].metrics["train/loss"]
    assert all(step.metrics["moe/max_vio_batch"] > 0.3 for step in run.steps)
    assert all(step.metrics["train/balance_loss"] > 0 and step.metrics["train/mtp_loss"] > 0 for step in run.steps)
    biases = [weight for name, weight in run.weights.items() if name.endswith("expert_bias_E")]
    assert len(biases) == 3
    assert all(bias.abs().max() > 0.01 for bias in biases)
    assert_norms_are_those_of_the_whole_gradients(run)


def losses_near(
    rank: int, world: int, direction: dict[str, torch.Tensor], shift: float
) -> tuple[float, dict[str, Any]]:
    """Total loss of the first step with weights moved along ``direction``, and its gradient."""
    trainer = tiny_trainer(tiny_config(MODELS["v3"], {"stability": {"clip": {"kind": "none"}}}), (0,))
    force_routing(trainer)
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if name in direction:
                parameter.add_(direction[name], alpha=shift)
    metrics = trainer.step().metrics
    return sum(metrics[f"train/{name}"] for name in ("loss", "mtp_loss", "balance_loss")), gradients(trainer)


@pytest.mark.parametrize(
    "part", ["layers.0", "layers.1.attention", ".router.", ".experts.", ".shared.", "mtp.", "embed", "head"]
)
def test_the_gradient_is_the_slope_of_the_reported_loss(part: str) -> None:
    """Central differences along the gradient itself, whose slope is the gradient's norm."""
    _, gradient = losses_near(0, 1, {}, 0.0)
    chosen = {name: g for name, g in gradient.items() if part in name}
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in chosen.values()))
    unit = {name: g / norm for name, g in chosen.items()}
    # Steps as long as curvature allows: fp32 leaves an error of about 3e-7 in the loss.
    ahead, behind = (losses_near(0, 1, unit, shift)[0] for shift in (3e-3, -3e-3))
    assert (ahead - behind) / 6e-3 == pytest.approx(norm, rel=2e-2)


def test_micro_batches_add_up_to_the_batch() -> None:
    check("v3", 1, {}, micro=2)


@pytest.mark.parametrize(
    ("world", "parallel"),
    [
        pytest.param(2, {"expert_parallel": 2}, id="ep2"),
        pytest.param(2, {"expert_parallel": 2, "dense": "shard"}, id="ep2-sharded"),
        pytest.param(4, {"expert_parallel": 2}, id="ep2x2"),
        pytest.param(4, {"expert_parallel": 4}, id="ep4"),
    ],
)
def test_ranks_train_what_one_process_trains(world: int, parallel: dict[str, Any]) -> None:
    check("v3", world, parallel, micro=1)


def test_ranks_train_stages_as_one_process_does() -> None:
    check("v3-staged", 2, {"expert_parallel": 2}, micro=1)


def test_bf16_ranks_agree_to_its_rounding() -> None:
    check("v3-forced", 2, {"expert_parallel": 2}, micro=2, compute="bf16", tolerance=BF16)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "world", "expert_parallel", "dense", "micro"),
    [
        # What the divisions above are not: without expert parallelism, and sharded over four ranks in whole batches.
        *(("v3", world, 1, dense, micro) for world, dense, micro in [(2, "shard", None), (4, "replicate", 1)]),
        *(("v3", 4, expert_parallel, "shard", None) for expert_parallel in (1, 2, 4)),
        ("v1", 4, 2, "shard", None),
        ("v1", 4, 4, "replicate", 1),
    ],
)
def test_every_division_trains_the_same_model(
    model: str, world: int, expert_parallel: int, dense: str, micro: int | None
) -> None:
    check(model, world, {"expert_parallel": expert_parallel, "dense": dense}, micro)

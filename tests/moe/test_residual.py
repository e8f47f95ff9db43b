"""Models with several residual streams: what they start as, what they measure, and what the constraint is for (T8)."""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from moe.batch import Batch
from moe.config.residual import HyperConfig
from moe.layers.hyper_connections import HyperConnection
from moe.model import Transformer
from moe.monitors import measure
from moe.trainer import Trainer
from tests.distributed import run_distributed
from tests.moe.build import ALONE, build_model, positions_of, random_ids, small_config
from tests.moe.divisions import DIVISIONS, refused, resumed
from tests.moe.layers.test_hyper_connections import EPS, balanced
from tests.moe.tiny import MTP, global_batch, gradients, relative_difference, tiny_config, tiny_trainer

KINDS = ["hyper", "mhc"]


def streams(kind: str, alpha: float = 1.0) -> dict[str, Any]:
    """An ``alpha`` of 1 makes the factors depend on the token as much as they may after training."""
    return {"model": {"residual": {"kind": kind, "alpha": alpha}}}


def connections(model: Transformer) -> Iterator[HyperConnection]:
    """In the order of the forward."""
    return (module for module in model.modules() if isinstance(module, HyperConnection))


@pytest.mark.parametrize("placement", ["pre", "sandwich", "reordered"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_start_is_the_plain_model(kind: str, placement: str) -> None:
    """Matrices are drawn by name, so both have the same."""
    norms = {"model": {"norm_placement": placement}}
    trainers = [tiny_trainer(tiny_config(MTP, norms, changes)) for changes in (streams(kind, 1e-7), {})]
    batch = global_batch(trainers[0].config, 0)
    with torch.no_grad():
        found, plain = (trainer.model(batch) for trainer in trainers)
    torch.testing.assert_close(found.logits, plain.logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.mtp_logits, plain.mtp_logits, rtol=1e-4, atol=1e-5)


def test_a_plain_residual_has_no_parameters() -> None:
    names = set(build_model(small_config(mtp={"depth": 1})).state_dict())
    assert not any("residual" in name or "collapse" in name or "connection" in name for name in names)


@pytest.mark.parametrize("kind", KINDS)
def test_every_value_of_a_connection_is_set_at_the_start(kind: str) -> None:
    trainer = tiny_trainer(tiny_config(MTP, streams(kind, 0.25), {"model": {"residual": {"streams": 3}}}))
    parts = {name: p for name, p in trainer.model.named_parameters() if ".connection." in name or "collapse" in name}
    assert len(parts) == 3 * (2 * 4 + 2)  # two sub-layers in four blocks, and the ends of trunk and MTP block
    assert all(".connection." in name for name in parts)
    for name, parameter in parts.items():
        if name.endswith("scale"):
            assert (parameter == 0.25).all(), name
        elif name.endswith("weight"):
            assert float(parameter.detach().std()) == pytest.approx(0.06, rel=0.2), name
    offsets = [c.connection.offset.detach() for c in connections(trainer.model)]
    assert [int(offset[:3].argmax()) for offset in offsets] == [0, 1, 2, 0, 1, 2, 0, 1]
    # What has one dimension does not decay.
    assert {name for name, p in parts.items() if p.dim() == 1} == {n for n in parts if not n.endswith("weight")}


def test_each_stream_enters_multi_token_prediction_by_itself() -> None:
    model = build_model(small_config(mtp={"depth": 1}, residual={"kind": "mhc"}))
    assert model.mtp is not None
    ids = random_ids(2, 14)
    ends: list[torch.Tensor] = []

    def remember(module: torch.nn.Module, args: tuple[torch.Tensor]) -> None:
        ends.append(args[0])

    model.collapse.register_forward_pre_hook(remember)
    with torch.no_grad():
        output = model(Batch(ids))
        ahead = model.mtp.embed_norm(model.embed.weight[ids[:, 1:13]])
        each = [model.mtp.project(torch.cat((model.mtp.hidden_norm(x), ahead), dim=-1)) for x in ends[0].unbind(2)]
        x, _ = model.mtp.block(torch.stack(each, dim=2), positions_of(ahead))
        expected = model.head(model.mtp.norm(model.mtp.collapse(x)))
    torch.testing.assert_close(output.mtp_logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_changes_neither_figures_nor_gradients(kind: str) -> None:
    config = tiny_config(MTP, streams(kind), {"monitors": {"every_steps": 1}})
    batch = global_batch(config, 0, padded=True)
    assert batch.real_BL is not None

    def step(filled: Batch) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
        trainer = Trainer(config, ALONE, lambda _: [filled])
        return trainer.step().metrics, gradients(trainer)

    (metrics, gradient), (other_metrics, other_gradient) = (
        step(replace(batch, ids_BL=batch.ids_BL.masked_fill(~batch.real_BL, fill))) for fill in (0, 7)
    )
    # The least gain of the control is a small difference of large numbers.
    assert metrics == pytest.approx(other_metrics, rel=5e-4, abs=1e-7)
    for name, value in gradient.items():
        assert relative_difference(other_gradient[name], value) < 1e-5, name


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_the_slope_of_the_loss(kind: str) -> None:
    """Central differences along the gradient of all connections, on a dense model."""
    config = tiny_config(MTP, streams(kind, 0.3), {"model": {"moe": {"num_experts": 0}}})
    config = config.model_copy(update={"stability": tiny_config({"stability": {"clip": {"kind": "none"}}}).stability})

    def loss(direction: dict[str, torch.Tensor], shift: float) -> tuple[float, dict[str, torch.Tensor]]:
        trainer = tiny_trainer(config, (0,))
        with torch.no_grad():
            for name, parameter in trainer.model.named_parameters():
                if name in direction:
                    parameter.add_(direction[name], alpha=shift)
        metrics = trainer.step().metrics
        return metrics["train/loss"] + metrics["train/mtp_loss"], gradients(trainer)

    gradient = {name: g for name, g in loss({}, 0.0)[1].items() if ".connection." in name}
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradient.values()))
    unit = {name: g / norm for name, g in gradient.items()}
    slope = (loss(unit, 1e-3)[0] - loss(unit, -1e-3)[0]) / 2e-3
    assert slope == pytest.approx(norm, rel=2e-2)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_figures_of_streams_are_those_of_plain_loops(kind: str) -> None:
    model = build_model(small_config(mtp={"depth": 1}, residual={"kind": kind, "streams": 3}))
    generator = torch.Generator().manual_seed(2)
    ids, real = torch.randint(96, (3, 9), generator=generator), torch.arange(9) < torch.tensor([[4], [2], [0]])
    batch = Batch(ids, real)
    inputs: list[torch.Tensor] = []
    outputs: list[torch.Tensor] = []
    trunk = list(connections(model))[: 2 * 3]

    def before_connection(module: torch.nn.Module, args: tuple[torch.Tensor]) -> None:
        inputs.append(args[0])

    handles = [connection.register_forward_pre_hook(before_connection) for connection in trunk]

    def after_block(module: torch.nn.Module, args: tuple[Any, ...], output: tuple[torch.Tensor, Any]) -> None:
        outputs.append(output[0])

    handles += [block.register_forward_hook(after_block) for block in model.blocks()]
    model(batch)
    for handle in handles:
        handle.remove()

    sums = []
    for row, position in real[:, :7].nonzero().tolist():
        product = torch.eye(3, dtype=torch.float64)
        for connection, x in zip(trunk, inputs, strict=True):
            read, flat = connection.connection, x[row, position].flatten().double()
            normed = flat / (flat.square().mean() + EPS).sqrt()
            logits = float(read.scale[2]) * (read.weight.double()[6:] @ normed) + read.offset.double()[6:]
            rows: list[list[float]] = logits.view(3, 3).tolist()
            product = torch.tensor(rows if kind == "hyper" else balanced(rows, 20), dtype=torch.float64) @ product
        sums += [*product.sum(dim=0).abs().tolist(), *product.sum(dim=1).abs().tolist()]
    found = measure(model, batch, ALONE)
    assert found.residual_gain == pytest.approx((min(sums), max(sums)), rel=1e-3)
    headline = found.headline()
    named = headline["activation/residual_gain_min"], headline["activation/residual_gain_max"]
    assert named == found.residual_gain
    ahead = real[:, :7] & real[:, 1:8]
    for counted, x, rms in zip((real[:, :7],) * 3 + (ahead,), outputs, found.residual_rms, strict=True):
        assert rms == pytest.approx(float(x[counted].square().mean().sqrt()), rel=1e-5)


def test_a_plain_residual_has_no_gain_and_padding_alone_has_one_of_0() -> None:
    plain, several = (build_model(small_config(residual={"kind": kind})) for kind in ("plain", "mhc"))
    nothing = Batch(random_ids(2, 9), torch.zeros(2, 9, dtype=torch.bool))
    assert measure(plain, nothing, ALONE).residual_gain is None
    assert measure(several, nothing, ALONE).residual_gain == (0.0, 0.0)


CASES = {"mhc": [streams("mhc"), {"precision": {"compute": "bf16"}}]}


def test_training_goes_on_bit_for_bit_from_a_saved_state() -> None:
    for broken in run_distributed(resumed, 2, CASES, DIVISIONS["ep2-sharded"], (3,)):
        assert broken == []


def test_a_refused_step_changes_nothing() -> None:
    for broken in run_distributed(refused, 2, CASES, DIVISIONS["ep2-sharded"]):
        assert broken == []


def deep(kind: str, lr: float = 1e-3) -> Trainer:
    """48 sub-layers."""
    size = {"hidden_size": 16, "num_layers": 24, "intermediate_size": 16, "moe": {"num_experts": 0}}
    data = {"global_batch_size": 4, "sequence_length": 8}
    config = tiny_config({"model": size, "data": data}, streams(kind, HyperConfig().alpha), {"optimizer": {"lr": lr}})
    return tiny_trainer(config)


def gain(trainer: Trainer) -> tuple[float, float]:
    found = measure(trainer.model, trainer.batches(0)[0], trainer.ranks).residual_gain
    assert found is not None
    return found


def test_disturbed_mixing_multiplies_over_the_depth_unless_it_is_constrained() -> None:
    """T8, untrained: N(0, 0.5^2), the same draws, on every static offset of A, B and C of both arms."""
    gains = {}
    for kind in KINDS:
        trainer, generator = deep(kind), torch.Generator().manual_seed(3)
        with torch.no_grad():
            for connection in connections(trainer.model):
                offset = connection.connection.offset
                offset.add_(torch.randn(offset.shape, generator=generator), alpha=0.5)
        gains[kind] = gain(trainer)
    assert gains["hyper"][1] > 10
    assert gains["mhc"][0] > 0.3
    assert gains["mhc"][1] < 3


@pytest.mark.slow
def test_trained_mixing_multiplies_over_the_depth_unless_it_is_constrained() -> None:
    """T8, trained: 10 steps from the same start at a learning rate of 0.1, which is meant to be too large."""
    gains = {}
    for kind in KINDS:
        trainer = deep(kind, lr=0.1)
        assert gain(trainer) == pytest.approx((1.0, 1.0), rel=0.2)
        for _ in range(10):
            trainer.step()
        gains[kind] = gain(trainer)
    assert gains["hyper"][1] > 10
    assert gains["mhc"][0] > 0.3
    assert gains["mhc"][1] < 3


@pytest.mark.parametrize(
    ("residual", "named"),
    [
        ({"kind": "mhc", "streams": 1}, "streams"),
        ({"kind": "hyper", "sinkhorn_rounds": 3}, "sinkhorn_rounds"),
        ({"kind": "plain", "streams": 4}, "streams"),
        ({"kind": "mhc", "alpha": 0.0}, "alpha"),
        ({"kind": "mhc", "sinkhorn_rounds": 0}, "sinkhorn_rounds"),
    ],
)
def test_options_without_an_effect_are_refused_by_name(residual: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        small_config(residual=residual)

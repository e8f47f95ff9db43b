"""Anticipatory routing in one process: whose choices are replayed, and what they touch."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

import moe.layers.moe
from moe.batch import Batch
from moe.config.balance import NoBalanceConfig
from moe.config.model import ModelConfig
from moe.layers.router import Routing
from moe.model import Transformer
from moe.monitors import measure
from moe.report import Report
from moe.schedule import Moment
from moe.stability.anticipation import AlwaysAnticipation
from moe.stability.technique import Choose, StepLoad, Technique
from moe.trainer import Trainer
from tests.moe.build import ALONE
from tests.moe.stability.anticipating import (
    GROUPS,
    LAG,
    PARTS,
    STAGES,
    STILL,
    Changes,
    RoutersSeen,
    always,
    ids_by,
)
from tests.moe.tiny import (
    MTP,
    PADDED,
    assert_bit_identical,
    global_batch,
    gradients,
    load,
    same_bits,
    saved,
    tiny_config,
    tiny_trainer,
    trained,
    weights,
)

# ---- lag 0 (T5a) -----------------------------------------------------------------------------------------------------


class Replay(Technique):
    """Gives every step what its own weights choose: a lag of 0."""

    def __init__(self) -> None:
        super().__init__(NoBalanceConfig(), ModelConfig(), ALONE)
        self.replayed = 0

    def before_forward(self, choose: Choose, moment: Moment) -> list[torch.Tensor]:
        self.replayed += 1
        return choose(moment.step)


def stepped(changes: Sequence[Changes], alter: Callable[[Trainer], None], steps: int = 3) -> Any:
    """(figures, gradients and weights) of some steps, two of them with padding."""
    trainer = tiny_trainer(tiny_config(MTP, *changes), PADDED)
    alter(trainer)
    metrics: list[dict[str, float]] = []
    tensors: dict[str, torch.Tensor] = {}
    for step in range(steps):
        metrics.append(trainer.step().metrics)
        tensors |= {f"{step}.{name}": gradient for name, gradient in gradients(trainer).items()}
    return metrics, tensors | weights(trainer)


@pytest.mark.parametrize(
    "changes",
    [[], [GROUPS], [PARTS], [{"precision": {"compute": "bf16"}}], [{"model": {"moe": {"affinity": "softmax"}}}]],
    ids=["plain", "groups", "micro-batches", "bf16", "softmax"],
)
def test_experts_chosen_in_advance_by_the_same_weights_change_no_bit_of_loss_and_gradients(
    changes: list[Changes],
) -> None:
    replay = Replay()

    def replaying(trainer: Trainer) -> None:
        trainer.techniques["replay"] = replay

    assert_bit_identical(stepped(changes, replaying), stepped(changes, lambda trainer: None))
    assert replay.replayed == 3


@pytest.mark.parametrize("changes", [[], [PARTS], [STAGES]], ids=["plain", "micro-batches", "stages"])
def test_with_weights_that_do_not_move_a_queue_of_any_lag_changes_no_bit(changes: list[Changes]) -> None:
    """The queue gives back what went in, in the right order: every batch has other ids."""
    figures, tensors = stepped([*changes, STILL, always()], lambda trainer: None, steps=8)
    lags = [metrics.pop("moe/anticipation_lag") for metrics in figures]
    assert [metrics.pop("moe/stale_share") for metrics in figures] == [0.0] * 8
    assert lags == [0, 1, 2, 3, 3, 3, 3, 3]
    assert_bit_identical((figures, tensors), stepped([*changes, STILL], lambda trainer: None, steps=8))


def test_a_lag_of_0_needs_no_forward_and_is_the_ordinary_loop() -> None:
    def without_lag(trainer: Trainer) -> None:
        technique = trainer.techniques["anticipation"]
        assert isinstance(technique, AlwaysAnticipation)
        technique.lag = 0
        trainer.choose = None  # type: ignore[method-assign, assignment]

    figures, tensors = stepped([always()], without_lag)
    assert [metrics.pop("moe/anticipation_lag") for metrics in figures] == [0.0] * 3
    assert [metrics.pop("moe/stale_share") for metrics in figures] == [0.0] * 3
    assert_bit_identical((figures, tensors), stepped([], lambda trainer: None))


# ---- replay (T5b) ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [[], [GROUPS, PARTS], [STAGES]], ids=["plain", "groups in parts", "stages"])
def test_a_step_takes_what_the_model_of_lag_steps_ago_chooses_for_its_batch(changes: list[Changes]) -> None:
    config = tiny_config(MTP, always(), *changes)
    trainer = tiny_trainer(config, padded_steps=(1, 4, 6))
    seen = RoutersSeen(trainer)
    models = []
    shares = []
    for step in range(9):
        models.append(copy.deepcopy(trainer.model))
        metrics = trainer.step().metrics
        taken = seen.ids_of_step()
        batch = global_batch(config, step, padded=step in (1, 4, 6))
        then, today = ids_by(models[max(0, step - LAG)], batch), ids_by(models[step], batch)
        assert len(taken) == 3, "the MTP block's layer is one of them"
        assert all(torch.equal(a, b) for a, b in zip(taken, then, strict=True)), step
        assert metrics["moe/anticipation_lag"] == min(step, LAG)
        assert metrics["moe/stale_share"] == pytest.approx(stale_share(batch, taken, models[step]))
        if step == 0:
            assert all(torch.equal(a, b) for a, b in zip(taken, today, strict=True))
        shares.append(metrics["moe/stale_share"])
    assert shares[0] == 0
    assert min(shares[2:]) > 0.01, "weights must move far enough for the lag to show"


def stale_share(batch: Batch, taken: list[torch.Tensor], model: Transformer) -> float:
    """Decision by decision, real tokens only: each layer's own choice on what it reads when earlier ones are forced."""
    with torch.no_grad():
        routings = model(batch, taken).routings
    length = batch.ids_BL.shape[1] - 2
    real_BL = torch.ones_like(batch.ids_BL, dtype=torch.bool) if batch.real_BL is None else batch.real_BL
    differing = counted = 0
    for layer, (routing, ids_TK) in enumerate(zip(routings, taken, strict=True)):
        is_mtp = layer == len(taken) - 1
        real_BS = real_BL[:, :length] & real_BL[:, 1 : length + 1] if is_mtp else real_BL[:, :length]
        own_TK = model.moe_layers()[layer].router.select(routing.affinity_TE)
        for own, forced, real in zip(own_TK.tolist(), ids_TK.tolist(), real_BS.flatten().tolist(), strict=True):
            differing += real and set(own) != set(forced)
            counted += real
    return differing / counted


def test_other_weights_change_features_and_gates_but_not_the_experts() -> None:
    trainer = tiny_trainer(tiny_config(MTP, always()))
    for _ in range(LAG + 1):
        trainer.step()
    tensors, scalars = saved(trainer)
    seen = RoutersSeen(trainer)
    trainer.step()
    before = seen.of_step()
    load(trainer, tensors, scalars)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.mul_(1 + 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
        for router in trainer.routers:
            router.expert_bias_E.neg_()
    trainer.step()
    for old, new in zip(before, seen.of_step(), strict=True):
        assert torch.equal(old.ids_TK, new.ids_TK)
        assert torch.equal(old.load_E, new.load_E)
        assert not torch.allclose(old.logits_TE, new.logits_TE, rtol=0.05)
        assert not torch.allclose(old.gates_TK, new.gates_TK, rtol=0.01)


# ---- gradients and load (T5c) ----------------------------------------------------------------------------------------


class Forced(Technique):
    """Sends every token to the first experts."""

    def __init__(self, config: Any) -> None:
        super().__init__(NoBalanceConfig(), config.model, ALONE)
        self.layers, self.k = config.model.num_moe_layers, config.model.moe.top_k
        self.load: torch.Tensor | None = None

    def before_forward(self, choose: Choose, moment: Moment) -> list[torch.Tensor]:
        tokens = moment.global_batch_size * moment.sequence_length
        ids_TK = torch.arange(tokens).unsqueeze(1) % 3 + torch.arange(self.k)
        return [ids_TK] * self.layers

    def after_step(self, routers: Sequence[Any], load: StepLoad, moment: Moment) -> None:
        self.load = load.counts_ME.clone()


def test_gates_alone_teach_the_router_and_experts_outside_the_given_set_learn_nothing() -> None:
    config = tiny_config(MTP, {"stability": {"balance_loss": {"kind": "none"}}})
    trainer = tiny_trainer(config)
    trainer.techniques["forced"] = Forced(config)
    trainer.step()
    inside = slice(0, 2 + config.model.moe.top_k)
    for layer in trainer.model.moe_layers():
        gradient = layer.router.weight.grad
        assert gradient is not None
        assert gradient[inside].abs().amax(dim=1).min() > 0
        assert not gradient[inside.stop :].any()
        assert layer.experts.w_up.grad is not None
        assert not layer.experts.w_up.grad[inside.stop :].any()


def test_the_biases_follow_the_load_of_the_given_experts() -> None:
    config = tiny_config(MTP)
    trainer = tiny_trainer(config, padded_steps=(0,))
    trainer.techniques["forced"] = forced = Forced(config)
    metrics = trainer.step().metrics
    batch = global_batch(config, 0, padded=True)
    assert batch.real_BL is not None
    real, pairs = batch.real_BL[:, :16], batch.real_BL[:, :16] & batch.real_BL[:, 1:17]
    expected = torch.zeros(3, 8, dtype=torch.int64)
    for layer, counted in enumerate((real, real, pairs)):
        for token, counts in enumerate(counted.flatten().tolist()):
            if counts:
                expected[layer, [token % 3, token % 3 + 1]] += 1
    assert forced.load is not None
    assert torch.equal(forced.load, expected)
    mean = expected.double().mean(dim=1)
    assert metrics["moe/max_vio_batch"] == pytest.approx(float((expected.amax(dim=1) / mean - 1).mean()))
    for router, counts in zip(trainer.routers, expected.double(), strict=True):
        direction = (counts.mean() - counts).sign()
        wanted = 1e-2 * (direction - direction.mean())
        torch.testing.assert_close(router.expert_bias_E.double(), wanted, rtol=0, atol=1e-7)


# ---- what it must not touch ------------------------------------------------------------------------------------------


def test_evaluation_and_health_figures_route_by_the_weights_of_the_day() -> None:
    config = tiny_config(MTP, always())
    held_out = global_batch(config, 90)

    def looked_at(look: bool) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
        trainer = tiny_trainer(config, PADDED)
        metrics = []
        for _ in range(6):
            if look:
                counts = trainer.evaluate([held_out]).counts_ME
                own = ids_by(trainer.model, held_out)
                assert counts is not None
                assert counts.tolist() == [torch.bincount(ids.flatten(), minlength=8).tolist() for ids in own]
                measure(trainer.model, held_out, trainer.ranks)
            metrics.append(trainer.step().metrics)
        return metrics, saved(trainer)[0]

    assert_bit_identical(looked_at(True), looked_at(False))


class Watcher(Technique):
    """How often the trainer shows a forward to techniques."""

    def __init__(self) -> None:
        super().__init__(NoBalanceConfig(), ModelConfig(), ALONE)
        self.forwards = 0

    def after_forward(self, routers: Sequence[Any], routings: Sequence[Routing]) -> None:
        self.forwards += 1


def test_choosing_in_advance_is_shown_to_nobody_and_counts_nothing() -> None:
    config = tiny_config(MTP, always(), PARTS)
    trainer = tiny_trainer(config)
    trainer.techniques["watcher"] = watcher = Watcher()
    reports: list[Report] = [trainer.step() for _ in range(6)]
    assert watcher.forwards == 6 * 4
    before = saved(trainer)
    trainer.parameters.clear_gradients()
    trainer.choose(19)
    after = saved(trainer)
    assert all(same_bits(before[0][name], tensor) for name, tensor in after[0].items())
    assert all(parameter.grad is None for parameter in trainer.model.parameters())
    assert reports[-1].metrics.keys() - trained([])[0][-1].keys() == {"moe/anticipation_lag", "moe/stale_share"}


@pytest.mark.parametrize(("changes", "last"), [({}, "layers.2"), (MTP, "mtp.block")], ids=["trunk", "mtp"])
def test_choosing_ends_at_the_last_router(changes: Changes, last: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = tiny_trainer(tiny_config(changes))
    called: list[str] = []
    for name, module in trainer.model.named_modules():
        module.register_forward_hook(lambda _, args, y, name=name: called.append(name))
    dispatched: list[Any] = []

    def dispatch(x_TD: torch.Tensor, *args: Any) -> torch.Tensor:
        dispatched.append(args)
        return x_TD

    monkeypatch.setattr(moe.layers.moe, "dispatch_combine", dispatch)
    trainer.choose(0)
    layers = trainer.config.model.num_moe_layers
    assert sum(name.endswith(".router") for name in called) == layers
    assert len(dispatched) == sum(name.endswith(".shared") for name in called) == layers - 1
    assert {"head", "norm", f"{last}.ffn.shared"} & set(called) == set()


@pytest.mark.parametrize("changes", [{}, MTP, GROUPS, {"model": {"norm_placement": "sandwich"}}])
def test_what_is_chosen_in_advance_is_what_a_whole_forward_chooses(changes: Changes) -> None:
    config = tiny_config(changes)
    trainer = tiny_trainer(config)
    wanted = ids_by(trainer.model, global_batch(config, 0))
    chosen = trainer.choose(0)
    assert len(chosen) == len(wanted) == config.model.num_moe_layers
    assert all(torch.equal(a, b) for a, b in zip(chosen, wanted, strict=True))

"""Anticipatory routing in one process: whose choices are replayed when, and what they touch."""

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
from moe.schedule import Moment
from moe.stability.anticipation import AlwaysAnticipation
from moe.stability.technique import Choose, StepLoad, Technique
from moe.trainer import Report, Trainer
from tests.moe.build import ALONE
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

LAG = 3
Changes = dict[str, Any]


def always(lag: int = LAG) -> Changes:
    return {"stability": {"anticipation": {"kind": "always", "lag": lag}}}


def triggered(at_steps: list[int], steps: int = LAG + 2, lag: int = LAG) -> Changes:
    return {"stability": {"anticipation": {"kind": "triggered", "lag": lag, "steps": steps, "at_steps": at_steps}}}


GROUPS: Changes = {"model": {"moe": {"num_groups": 4, "top_groups": 2, "top_k": 3}}}
PARTS: Changes = {"data": {"micro_batch_size": 2}}
STAGES: Changes = {
    "monitors": {"every_steps": 0},
    "schedule": {
        "kind": "stages",
        "stages": [
            {"steps": 3, "lr": {"kind": "linear"}, "global_batch_size": 4, "sequence_length": 8},
            {"steps": 3},
            {"steps": 6, "global_batch_size": 12, "sequence_length": 8},
        ],
    },
}
# Weights that do not move, so that the choices of any step are those of every other.
STILL: Changes = {
    "optimizer": {"lr": 1e-30},
    "stability": {"balance": {"kind": "none"}, "balance_loss": {"kind": "sequence", "coefficient": 1e-2}},
}


class RoutersSeen:
    """What the routers of a trainer decide in its training forwards, told apart by autograd being on."""

    def __init__(self, trainer: Trainer) -> None:
        self.calls: list[list[Routing]] = [[] for _ in trainer.routers]
        for layer, router in enumerate(trainer.routers):
            router.register_forward_hook(lambda _, args, routing, layer=layer: self._keep(layer, routing))

    def _keep(self, layer: int, routing: Routing) -> None:
        if torch.is_grad_enabled():
            self.calls[layer].append(routing)

    def of_step(self) -> list[Routing | Any]:
        """Since the last call: one per layer of a single micro-batch."""
        taken, self.calls = self.calls, [[] for _ in self.calls]
        assert all(len(calls) == 1 for calls in taken)
        return [calls[0] for calls in taken]

    def ids_of_step(self) -> list[torch.Tensor]:
        """Since the last call: each layer's ids, over all micro-batches."""
        taken, self.calls = self.calls, [[] for _ in self.calls]
        return [torch.cat([routing.ids_TK for routing in calls]) for calls in taken]


def ids_by(model: Transformer, batch: Batch) -> list[torch.Tensor]:
    """What every layer of ``model`` chooses in a whole ordinary forward."""
    with torch.no_grad():
        return [routing.ids_TK for routing in model(batch).routings]


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


# ---- when it is on ---------------------------------------------------------------------------------------------------


def lags(trainer: Trainer, steps: int, after: Callable[[int], None] = lambda step: None) -> list[float | None]:
    """The lag of each step, None where the mode is off; ``after`` is called after each step, counted from 1."""
    found = []
    for step in range(1, steps + 1):
        metrics = trainer.step().metrics
        assert ("moe/anticipation_lag" in metrics) == ("moe/stale_share" in metrics)
        found.append(metrics.get("moe/anticipation_lag"))
        after(step)
    return found


def test_a_trigger_starts_the_mode_at_the_next_step_and_it_ends_by_itself() -> None:
    trainer = tiny_trainer(tiny_config(triggered([2], steps=5)))
    assert lags(trainer, 10) == [None, None, 0, 1, 2, 3, 3, None, None, None]


def test_a_trigger_in_the_meantime_prolongs_the_mode_and_keeps_the_queue() -> None:
    trainer = tiny_trainer(tiny_config(triggered([2, 4], steps=5)))
    assert lags(trainer, 12) == [None, None, 0, 1, 2, 3, 3, 3, 3, None, None, None]


@pytest.mark.parametrize("pause", [1, 3])
def test_a_trigger_after_the_end_ramps_up_anew(pause: int) -> None:
    """Also where the old queue still held the batch."""
    trainer = tiny_trainer(tiny_config(triggered([1, 5 + pause], steps=4)))
    assert lags(trainer, 10 + pause) == [None, 0, 1, 2, 3, *[None] * pause, 0, 1, 2, 3, None]


def test_the_trainer_can_be_told_to_anticipate() -> None:
    trainer = tiny_trainer(tiny_config(triggered([19], steps=4)))

    def spike(step: int) -> None:
        if step in (3, 6):
            trainer.anticipate()

    assert lags(trainer, 12, spike) == [None, None, None, 0, 1, 2, 3, 3, 3, 3, None, None]


@pytest.mark.parametrize("changes", [[], [always()]], ids=["none", "always"])
def test_only_what_is_triggered_can_be_started(changes: list[Changes]) -> None:
    with pytest.raises(ValueError, match="kind is not triggered"):
        tiny_trainer(tiny_config(*changes)).anticipate()


def test_other_batches_drop_the_queue_and_the_lag_ramps_up_anew() -> None:
    config = tiny_config(MTP, always())
    trainer = tiny_trainer(config)
    seen = RoutersSeen(trainer)

    def skip(step: int) -> None:
        if step == 6:
            trainer.batches = lambda step: [global_batch(config, 100 + step)]
            trainer.forget_batches()

    assert lags(trainer, 6, skip) == [0, 1, 2, 3, 3, 3]
    seen.ids_of_step()
    models = []
    for step in range(6, 11):
        models.append(copy.deepcopy(trainer.model))
        assert trainer.step().metrics["moe/anticipation_lag"] == min(step - 6, LAG)
        then = ids_by(models[max(0, step - 6 - LAG)], global_batch(config, 100 + step))
        assert all(torch.equal(a, b) for a, b in zip(seen.ids_of_step(), then, strict=True)), step


def test_without_anticipation_other_batches_are_nothing_to_anyone() -> None:
    trainer = tiny_trainer(tiny_config())
    trainer.forget_batches()
    trainer.step()


def test_no_batch_is_asked_for_beyond_the_last_step_and_each_at_most_twice() -> None:
    config = tiny_config(always(), {"schedule": {"steps": 6}})
    trainer = tiny_trainer(config)
    asked: list[int] = []
    batches = trainer.batches

    def asking(step: int) -> Sequence[Batch]:
        asked.append(step)
        return batches(step)

    trainer.batches = asking
    each_step = []
    for _ in range(6):
        asked.clear()
        trainer.step()
        each_step.append(list(asked))
    assert each_step == [[0, 1, 2, 3], [1, 4], [2, 5], [3], [4], [5]]


def test_a_run_that_is_prolonged_goes_on_where_its_queue_ran_dry() -> None:
    config = tiny_config(always(), {"schedule": {"steps": 6}})
    short, long = tiny_trainer(config), tiny_trainer(tiny_config(always(), {"schedule": {"steps": 12}}))
    for _ in range(6):
        short.step()
    load(long, *saved(short))
    assert lags(long, 6) == [0, 1, 2, 3, 3, 3]


# ---- state -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "after"),
    [
        # In the ramp, where it ends, in the steady state.
        ([always()], (1, 3, 5)),
        # Before the trigger, in its ramp, at full lag, past a second trigger.
        ([triggered([2, 8], steps=5)], (1, 3, 6, 9)),
        ([always(), STAGES], (2, 5)),
    ],
    ids=["always", "triggered", "stages"],
)
def test_the_state_continues_bit_for_bit_at_any_point(changes: list[Changes], after: tuple[int, ...]) -> None:
    config = tiny_config(MTP, *changes)
    trainer = tiny_trainer(config, PADDED)
    states, metrics = {}, []
    for step in range(11):
        if step in after:
            states[step] = saved(trainer)
        metrics.append(trainer.step().metrics)
    end = saved(trainer)[0]
    assert sum(m.get("moe/stale_share", 0) > 0 for m in metrics) > 4
    other = tiny_trainer(config.model_copy(update={"seed": 99}), PADDED)
    for _ in range(7):
        other.step()
    for step, (tensors, scalars) in states.items():
        load(other, tensors, scalars)
        assert [other.step().metrics for _ in range(step, 11)] == metrics[step:], step
        assert all(same_bits(end[key], tensor) for key, tensor in saved(other)[0].items()), step


def test_the_queue_is_in_the_state_and_a_run_without_has_none() -> None:
    names = {name for name in tiny_trainer(tiny_config(always())).state().tensors if "anticipation" in name}
    assert names == {"stability.anticipation.ids", "stability.anticipation.progress"}
    assert not any("anticipation" in name for name in tiny_trainer(tiny_config()).state().tensors)


def test_a_refused_step_moves_the_queue_on_and_nothing_else() -> None:
    config = tiny_config(MTP, always())
    trainer = tiny_trainer(config)
    seen = RoutersSeen(trainer)

    def explode(gradient: torch.Tensor) -> torch.Tensor:
        return gradient * (float("inf") if trainer.steps_done == 4 else 1.0)

    trainer.model.moe_layers()[0].experts.w_up.register_hook(explode)
    models = []
    for step in range(9):
        models.append(copy.deepcopy(trainer.model))
        before = saved(trainer)
        report = trainer.step()
        assert report.taken == (step != 4)
        assert report.metrics["moe/anticipation_lag"] == min(step, LAG)
        then = ids_by(models[max(0, step - LAG)], global_batch(config, step))
        assert all(torch.equal(a, b) for a, b in zip(seen.ids_of_step(), then, strict=True)), step
        if step == 4:
            after = saved(trainer)
            moved = {name for name, tensor in after[0].items() if not same_bits(tensor, before[0][name])}
            assert moved == {"stability.anticipation.ids", "stability.anticipation.progress"}
            assert after[1] == {**before[1], "steps_done": before[1]["steps_done"] + 1}


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


# ---- refused configs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ([always(20)], r"stability.anticipation.lag \(20\) is never reached in 20 steps"),
        ([always(0)], "lag"),
        ([always(), {"model": {"moe": {"top_k": 8}}}], "every expert is chosen in any case"),
        ([triggered([1], steps=3)], r"ends the mode before its lag \(3\) is reached; make it at least 4"),
        ([triggered([])], "nothing triggers it: name steps in stability.anticipation.at_steps"),
        ([triggered([3, 20])], "at_steps: there is no step after step 20 of 20 in all"),
        ([triggered([0])], "at_steps"),
    ],
)
def test_what_would_have_no_effect_is_refused_by_name(changes: list[Changes], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        tiny_config(*changes)


def test_a_dense_model_has_nothing_to_anticipate() -> None:
    dense = {"model": {"moe": {"num_experts": 0, "num_shared_experts": 0}}, "stability": {"balance": {"kind": "none"}}}
    with pytest.raises(ValueError, match=r"kind is always, but model.moe.num_experts is 0"):
        tiny_config(dense, {"stability": {"balance_loss": {"kind": "none"}}}, always())

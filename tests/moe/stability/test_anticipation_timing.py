"""When anticipatory routing is on, with which lag, and what of it is saved."""

import copy
from collections.abc import Callable, Sequence

import pytest
import torch

from moe.batch import Batch
from moe.trainer import Trainer
from tests.moe.stability.anticipating import (
    LAG,
    STAGES,
    STILL,
    Changes,
    RoutersSeen,
    always,
    ids_by,
    triggered,
)
from tests.moe.tiny import (
    MTP,
    PADDED,
    global_batch,
    load,
    same_bits,
    saved,
    tiny_config,
    tiny_trainer,
)

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


# ---- refused configs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ([always(20)], r"stability.anticipation.lag \(20\) is never reached in 20 steps"),
        ([always(0)], "lag"),
        ([always(), {"model": {"moe": {"top_k": 8}}}], "every expert is chosen in any case"),
        ([triggered([1], steps=3)], r"ends the mode before its lag \(3\) is reached; make it at least 4"),
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


def test_as_a_control_layers_take_each_others_choices() -> None:
    control = {"stability": {"anticipation": {"shuffle_layers": True}}}
    taken = []
    for changes in ([], [control]):
        trainer = tiny_trainer(tiny_config(MTP, STILL, triggered([2]), *changes))
        seen = RoutersSeen(trainer)
        taken.append([(trainer.step(), seen.ids_of_step())[1] for _ in range(7)])
    for step, (own, exchanged) in enumerate(zip(*taken, strict=True)):
        places = 1 + step % 2 if step in range(3, 7) else 0
        turned = [*own[places:], *own[:places]]
        assert all(torch.equal(a, b) for a, b in zip(exchanged, turned, strict=True)), step
    assert not torch.equal(taken[0][4][0], taken[0][4][1])


def test_one_layer_has_nobody_to_exchange_choices_with() -> None:
    control = {"model": {"num_layers": 2}, "stability": {"anticipation": {"shuffle_layers": True}}}
    with pytest.raises(ValueError, match="shuffle_layers needs two MoE layers that choose, and the model has 1"):
        tiny_config(triggered([2]), control)

"""Faults of training: each does what it says, at its step, and once."""

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from moe.schedule import Moment
from moe.trainer import Trainer
from pipelines.errors import UserError
from pipelines.journal import Journal
from pipelines.outcome import Ending
from pipelines.run_folder import RunFolder
from pipelines.spike_event import read_events
from tests.distributed import run_distributed
from tests.moe.tiny import load, saved
from tests.pipelines.faults.scene import AT, By, Fault, bits, changed, faulty, gradients_at, weights_at
from tests.pipelines.small_run import metrics_of, run_loop

EP2: dict[str, Any] = {"parallel": {"workers": 2, "expert_parallel": 2}}
SHARDED: dict[str, Any] = {"parallel": {"workers": 2, "expert_parallel": 2, "dense": "shard"}}


def scale(trainer: Trainer, pattern: str, factor: float, rows: slice = slice(None)) -> int:
    """Multiply weights whose names contain a text, by hand; how many there are."""
    hit = [p for p in trainer.parameters.all if pattern in p.name]
    for parameter in hit:
        parameter.handle.data[rows] *= factor
    return len(hit)


def outlier(trainer: Trainer) -> int:
    (parameter,) = [p for p in trainer.parameters.all if p.name == "layers.2.ffn.experts.w_up"]
    parameter.handle.data[6, 24:48] *= 50
    return 1


BY_HAND = {
    "pattern": ({"kind": "weight_scaled", "parameters": "*.router.weight", "factor": -3}, 3),
    "group": ({"kind": "weight_scaled", "group": "experts", "factor": 1.5}, 6),
    "outlier": ({"kind": "activation_outlier", "layer": 2, "expert": 6}, 1),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_weights_are_changed_as_by_hand_before_the_step_and_never_again(tmp_path: Path, name: str) -> None:
    fault, number = BY_HAND[name]

    def edit(moment: Moment) -> None:
        if moment.step + 1 == AT:
            hands: dict[str, Any] = {
                "pattern": lambda: scale(by_hand, ".router.weight", -3),
                "group": lambda: scale(by_hand, ".experts.", 1.5),
                "outlier": lambda: outlier(by_hand),
            }
            assert hands[name]() == number

    by_hand = faulty(tmp_path / "unused")
    by_hand.hooks.append(By(before=edit))
    trainer = faulty(tmp_path / "run", {**fault, "step": AT})
    steps = AT + 3
    expected, found = weights_at(by_hand, steps), weights_at(trainer, steps)
    assert [changed(a, b) for a, b in zip(expected, found, strict=True)] == [{}] * steps
    clean = weights_at(faulty(tmp_path / "clean"), AT)
    assert [len(changed(a, b)) for a, b in zip(clean, found, strict=False)] == [0] * (AT - 1) + [number]


@pytest.mark.parametrize(
    ("target", "bit", "number"),
    [("weight", "sign", 31), ("gradient", "exponent", 30), ("weight", "low_mantissa", 0), ("gradient", 12, 12)],
)
def test_one_bit_of_one_number_is_flipped(tmp_path: Path, target: str, bit: str | int, number: int) -> None:
    look = weights_at if target == "weight" else gradients_at
    fault = {"kind": "bit_flip", "step": AT, "target": target, "bit": bit, "group": "router"}
    clean, found = look(faulty(tmp_path / "clean"), AT), look(faulty(tmp_path / "run", fault), AT)
    assert [changed(a, b) for a, b in zip(clean[:-1], found[:-1], strict=True)] == [{}] * (AT - 1)
    ((name, (position,)),) = changed(clean[-1], found[-1]).items()
    assert ".router." in name
    before, after = (int(bits(tensors[-1][name])[position]) % 2**32 for tensors in (clean, found))
    assert before ^ after == 1 << number


def test_which_number_is_hit_follows_from_seed_and_place_and_lies_anywhere(tmp_path: Path) -> None:
    fault = {"kind": "bit_flip", "step": 1, "bit": "sign"}

    def hit(number: int, seed: int, folder: Path) -> tuple[str, int]:
        # One of its own kind before it makes it another place; that one hits no step that is taken.
        before = [{**fault, "step": 9}] * number
        trainer = faulty(folder, *before, fault, seed=seed)
        ((name, (position,)),) = changed(
            weights_at(faulty(folder / "clean", seed=seed), 1)[0], weights_at(trainer, 1)[0]
        ).items()
        return name, position

    places = [hit(number, seed, tmp_path / f"{number}-{seed}") for number in range(2) for seed in range(2)]
    assert len(set(places)) == 4
    assert len({name for name, _ in places}) > 2
    assert hit(0, 0, tmp_path / "again") == places[0]


def test_a_nan_in_one_number_of_the_gradient(tmp_path: Path) -> None:
    fault = {"kind": "nan_gradient", "step": AT, "parameters": "layers.1.ffn.experts.*"}
    clean, found = gradients_at(faulty(tmp_path / "clean"), AT), gradients_at(faulty(tmp_path / "run", fault), AT)
    ((name, (position,)),) = changed(clean[-1], found[-1]).items()
    assert name.startswith("layers.1.ffn.experts.")
    assert math.isnan(found[-1][name].view(-1)[position])
    assert changed(clean[-2], found[-2]) == {}


def lr_of(trainer: Trainer, steps: int) -> list[float]:
    return [trainer.step().metrics["train/lr"] for _ in range(steps)]


def test_the_learning_rate_jumps_for_as_many_steps_as_it_says(tmp_path: Path) -> None:
    clean = lr_of(faulty(tmp_path / "clean"), 8)
    for steps in (1, 3):
        fault = {"kind": "lr_jump", "step": AT, "factor": 7, "steps": steps}
        found = lr_of(faulty(tmp_path / str(steps), fault), 8)
        factors = [7.0 if AT <= step < AT + steps else 1.0 for step in range(1, 9)]
        assert found == pytest.approx([lr * factor for lr, factor in zip(clean, factors, strict=True)])


def test_a_jump_that_a_rewind_cuts_short_does_not_come_back(tmp_path: Path) -> None:
    clean = lr_of(faulty(tmp_path / "clean"), 8)
    trainer = faulty(tmp_path / "run", {"kind": "lr_jump", "step": AT, "factor": 7, "steps": 4})
    states = []
    for _ in range(AT + 1):
        states.append(saved(trainer))
        trainer.step()
    for before in (AT - 2, AT):  # steps done
        load(trainer, *states[before])
        assert lr_of(trainer, 8 - before) == clean[before:]


def test_all_tokens_prefer_the_same_experts_after_a_collapse(tmp_path: Path) -> None:
    fault = {"kind": "router_collapse", "step": AT, "layer": 2}
    trainer = faulty(tmp_path, fault)
    loads = []
    trainer.model.moe_layers()[1].router.register_forward_hook(lambda *call: loads.append(call[2].load_E))
    found = weights_at(trainer, AT)
    assert loads[-1].tolist() == [128, 128, 0, 0, 0, 0, 0, 0]  # 8 sequences of 16 tokens
    assert max(load.max() for load in loads[: AT - 1]) < 128
    clean = weights_at(faulty(tmp_path / "clean"), AT)
    assert list(changed(clean[-1], found[-1])) == ["layers.2.ffn.router.weight"]


def test_more_experts_may_be_preferred_and_null_means_the_first_layer(tmp_path: Path) -> None:
    trainer = faulty(tmp_path, {"kind": "router_collapse", "step": 1, "experts": 5})
    (weights,) = weights_at(trainer, 1)
    rows = weights["layers.1.ffn.router.weight"]
    assert torch.equal(rows[:5], rows[:1].expand(5, -1))
    assert torch.equal(rows[5:], -rows[:1].expand(3, -1))


KINDS: list[Fault] = [
    {"kind": "weight_scaled", "group": "dense", "factor": 1.5},
    {"kind": "activation_outlier"},
    {"kind": "bit_flip", "bit": "sign"},
    {"kind": "bit_flip", "bit": "sign", "target": "gradient"},
    {"kind": "nan_gradient"},
    {"kind": "lr_jump", "factor": 3},
    {"kind": "router_collapse"},
]


@pytest.mark.parametrize("fault", KINDS, ids=lambda fault: f"{fault['kind']}-{fault.get('target', '')}")
def test_a_repeated_step_is_clean_after_a_rewind_and_as_it_was_after_a_restart(tmp_path: Path, fault: Fault) -> None:
    faults = ({**fault, "step": AT}, {**fault, "step": AT + 1})
    trainer = faulty(tmp_path, *faults)
    trainer.step()
    trainer.step()
    state = saved(trainer)
    reports = [trainer.step() for _ in range(2)]
    clean = faulty(tmp_path / "clean")
    load(clean, *state)
    expected = [clean.step().metrics for _ in range(2)]
    assert reports[0].metrics != expected[0]
    load(trainer, *state)
    assert [trainer.step().metrics for _ in range(2)] == expected
    # Workers that start again repeat the timeline that holds: it had the faults, unless that was taken back.
    for rewinds, metrics in (([], [report.metrics for report in reports]), ([AT - 1], expected)):
        Journal(rewinds=rewinds).write(RunFolder(tmp_path).journal)
        restarted = faulty(tmp_path, *faults)
        load(restarted, *state)
        assert str([restarted.step().metrics for _ in range(2)]) == str(metrics)  # NaN is not equal to itself


def test_a_fault_that_has_not_happened_yet_happens_after_a_restart(tmp_path: Path) -> None:
    faults = ({"kind": "lr_jump", "step": 1, "factor": 2}, {"kind": "lr_jump", "step": 2, "factor": 2})
    first = faulty(tmp_path, *faults)
    one = first.step().metrics["train/lr"]
    second = faulty(tmp_path, *faults)
    assert lr_of(second, 2) == pytest.approx([one, lr_of(faulty(tmp_path / "clean"), 2)[1] * 2])


def on_ranks(
    rank: int, world: int, folder: Path, fault: Fault, changes: dict[str, Any], look: str
) -> dict[str, list[int]]:
    """What the fault changes of what this rank holds, at its step."""
    see = weights_at if look == "weight" else gradients_at
    clean, found = see(faulty(folder / "clean", **changes), AT), see(faulty(folder / "run", fault, **changes), AT)
    assert [changed(a, b) for a, b in zip(clean[:-1], found[:-1], strict=True)] == [{}] * (AT - 1)
    return changed(clean[-1], found[-1])


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
@pytest.mark.parametrize("fault", [{"kind": "bit_flip", "target": "gradient"}, {"kind": "nan_gradient"}])
def test_a_gradient_is_hit_on_the_rank_that_is_named(tmp_path: Path, fault: Fault, rank: int) -> None:
    found = run_distributed(on_ranks, 2, tmp_path, {**fault, "step": AT, "rank": rank}, EP2, "gradient")
    assert sum(len(positions) for positions in found[rank].values()) == 1
    assert found[1 - rank] == {}


@pytest.mark.parametrize("changes", [pytest.param(EP2, marks=pytest.mark.slow), SHARDED], ids=["replicated", "sharded"])
def test_a_weight_is_hit_on_the_rank_that_is_named(tmp_path: Path, changes: dict[str, Any]) -> None:
    found = run_distributed(on_ranks, 2, tmp_path, {"kind": "bit_flip", "step": AT, "rank": 1}, changes, "weight")
    assert found[0] == {}
    assert sum(len(positions) for positions in found[1].values()) == 1


def test_an_expert_is_hit_where_it_is(tmp_path: Path) -> None:
    fault = {"kind": "activation_outlier", "step": AT, "expert": 6, "factor": 4}
    first, second = run_distributed(on_ranks, 2, tmp_path, fault, EP2, "weight")
    assert first == {}
    (positions,) = second.values()
    # Of the second rank's four experts the third: its lower 24 of 48 rows of 32.
    assert positions == list(range(2 * 48 * 32 + 24 * 32, 3 * 48 * 32))
    assert list(second) == ["layers.1.ffn.experts.w_up"]


def collapsed(rank: int, world: int, folder: Path) -> list[int]:
    trainer = faulty(folder, {"kind": "router_collapse", "step": AT}, **SHARDED)
    loads = []
    trainer.model.moe_layers()[0].router.register_forward_hook(lambda *call: loads.append(call[2].load_E))
    for _ in range(AT):
        assert trainer.step().differing == ()
    counts: list[int] = loads[-1].tolist()
    return counts


def test_a_router_that_is_sharded_collapses_on_all_ranks(tmp_path: Path) -> None:
    assert run_distributed(collapsed, 2, tmp_path) == [[64, 64, 0, 0, 0, 0, 0, 0]] * 2


def noticed(rank: int, world: int, folder: Path) -> list[tuple[bool, bool]]:
    trainer = faulty(folder, {"kind": "nan_gradient", "step": AT, "rank": 1}, **EP2)
    return [
        (report.taken, math.isfinite(report.metrics["train/grad_norm"]))
        for report in (trainer.step() for _ in range(AT + 1))
    ]


def test_nan_on_one_rank_is_seen_by_all_at_its_step(tmp_path: Path) -> None:
    one, other = run_distributed(noticed, 2, tmp_path)
    assert one == other == [(True, True)] * (AT - 1) + [(False, False), (True, True)]


@pytest.mark.parametrize("kind", ["weight_scaled", "bit_flip", "nan_gradient"])
def test_a_pattern_that_matches_nothing_is_refused_in_one_line(tmp_path: Path, kind: str) -> None:
    fault = {"kind": kind, "step": AT, "parameters": "*.rooter.*"} | (
        {"factor": 2.0} if kind == "weight_scaled" else {}
    )
    with pytest.raises(
        UserError, match=r"^faults\.1\.parameters \(\*\.rooter\.\*\) is the name of no parameter; "
    ) as caught:
        faulty(tmp_path, {"kind": "lr_jump", "step": 1, "factor": 2}, fault)
    assert "\n" not in str(caught.value)


def test_a_damaged_record_is_refused(tmp_path: Path) -> None:
    (tmp_path / "faults.json").write_text('{"happened": [{"nu')
    with pytest.raises(UserError, match=r"faults\.json is damaged"):
        faulty(tmp_path, {"kind": "lr_jump", "step": 1, "factor": 2})


def test_workers_that_start_again_repeat_what_they_did_with_its_faults(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that was not noticed, one whose update was refused, and one that had been taken back."""
    monkeypatch.setenv("STEADYMOE_HOME", str(tmp_path / "home"))
    run = RunFolder(tmp_path / "run")
    settings = (
        *("schedule.steps=60", "checkpoint.every_steps=30", "checkpoint.keep=9", "response.calm_steps=5"),
        "faults=[{kind: weight_scaled, step: 34, parameters: '*.router.weight', factor: 1.01},"
        " {kind: nan_gradient, step: 38}, {kind: weight_scaled, step: 50, parameters: head.weight, factor: 20.0}]",
    )
    assert run_loop(0, 1, run.path, settings) == Ending("finished", 60)
    events, whole = read_events(run.events), metrics_of(run.path)
    assert [(e.step, e.action) for e in events] == [
        (38, "skip_step"), (50, "skip_step"), (51, "rewind_skip_samples")
    ]  # fmt: skip
    shutil.rmtree(run.checkpoints / "step-00000060")
    run_loop(0, 1, run.path, settings)
    assert str(metrics_of(run.path)) == str(whole)
    assert [(e.id, e.outcome) for e in read_events(run.events)] == [(e.id, e.outcome) for e in events]

"""Copies of weights on several ranks: a difference of one bit is found and named, and nothing else is."""

from typing import Any

import pytest
import torch

from moe.hooks import Seen, StepHook
from moe.replicas import checksum
from moe.trainer import Trainer
from tests.distributed import run_distributed
from tests.moe.divisions import DIVISIONS, PADDED
from tests.moe.tiny import MTP, tiny_config, tiny_trainer

EVERY: dict[str, Any] = {"monitors": {"every_steps": 0, "replicas_every_steps": 1}}
EMBEDDING = "embed.weight"
EXPERTS = "layers.1.ffn.experts.w_up"
BIAS = "layers.2.ffn.router.expert_bias_E"


class Notes(StepHook):
    """What the trainer shows its hooks."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, ...]] = []

    def takes(self, seen: Seen) -> bool:
        self.seen.append(seen.differing)
        return True


def tensor_of(trainer: Trainer, name: str) -> torch.Tensor:
    """What this rank holds of a parameter or buffer."""
    held = {p.name: p.local for p in trainer.parameters.all} | dict(trainer.model.named_buffers())
    return held[name]


def flip(tensor: torch.Tensor, index: int, bit: int) -> None:
    bits = tensor.detach().view(-1).view(torch.int32)
    bits[index] ^= -(2**31) if bit == 31 else 1 << bit


def found(
    rank: int, world: int, parallel: dict[str, int], every: int, at: int, flips: list[tuple[int, str]], bit: int = 0
) -> list[tuple[str, ...]]:
    """What differs at each of 4 steps, by the reports, if a bit is flipped on a rank before step ``at``."""
    config = tiny_config(
        EVERY, {"monitors": {"replicas_every_steps": every}}, {"parallel": {"workers": world} | parallel}
    )
    trainer = tiny_trainer(config)
    notes = Notes()
    trainer.hooks.append(notes)
    differing = []
    for step in range(4):
        for chosen, name in flips:
            if step == at and rank == chosen:
                flip(tensor_of(trainer, name), 7, bit)
        differing.append(trainer.step().differing)
    assert notes.seen == differing
    return differing


def test_one_flipped_bit_on_one_rank_is_named_on_all_ranks_from_its_step_on() -> None:
    one, other = run_distributed(found, 2, {"expert_parallel": 2}, 1, 2, [(1, EMBEDDING)])
    assert one == other
    assert one[:3] == [(), (), (EMBEDDING,)]
    assert EMBEDDING in one[3]


def test_biases_and_copies_of_experts_are_compared_as_well() -> None:
    one, other = run_distributed(found, 2, {}, 1, 3, [(0, BIAS), (1, EXPERTS)])
    assert one == other == [(), (), (), (BIAS, EXPERTS)]


def test_experts_of_which_there_is_one_copy_are_not_compared() -> None:
    assert run_distributed(found, 2, {"expert_parallel": 2}, 1, 3, [(0, EXPERTS)]) == [[()] * 4] * 2


def test_between_two_comparisons_nothing_is_noticed() -> None:
    # The sign, because the lowest bit may be rounded away by an update.
    one, other = run_distributed(found, 2, {}, 2, 1, [(0, EMBEDDING)], 31)
    assert one == other
    assert [bool(names) for names in one] == [False, False, True, False]
    assert run_distributed(found, 2, {}, 0, 1, [(0, EMBEDDING)], 31) == [[()] * 4] * 2


def found_wherever_it_is(rank: int, world: int) -> list[list[tuple[str, ...]]]:
    """By the rank whose copy is hit."""
    return [found(rank, world, {"expert_parallel": 2}, 1, 3, [(where, EXPERTS)]) for where in range(world)]


@pytest.mark.slow
def test_of_two_copies_of_two_halves_of_the_experts_a_difference_in_either_is_found() -> None:
    assert run_distributed(found_wherever_it_is, 4) == [[[(), (), (), (EXPERTS,)]] * 4] * 4


def alarms(rank: int, world: int, parallel: dict[str, Any]) -> tuple[set[str], int]:
    trainer = tiny_trainer(tiny_config(MTP, EVERY, {"parallel": {"workers": world, **parallel}}), PADDED)
    names = {name for _ in range(8) for name in trainer.step().differing}
    return names, len(trainer.replicas.compared)


@pytest.mark.parametrize("division", DIVISIONS)
def test_no_division_gives_a_false_alarm(division: str) -> None:
    (one, compared), (other, _) = run_distributed(alarms, 2, DIVISIONS[division])
    assert one == other == set()
    # With dense weights sharded and experts divided there are copies of the biases alone, one for each of 3 layers.
    assert compared == 3 if division == "ep2-sharded" else compared > 3


def test_one_process_has_nothing_to_compare(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = tiny_trainer(tiny_config(EVERY))
    monkeypatch.setattr("moe.replicas.checksum", None)
    assert trainer.step().differing == ()


@pytest.mark.parametrize("size", [1, 2, 7, 8, 33])
def test_every_bit_counts_in_a_checksum(size: int) -> None:
    whole = torch.randn(size + 1, generator=torch.Generator().manual_seed(0))
    for tensor in (whole[:size].clone(), whole[1:]):  # the second does not begin where a word of 64 bits does
        before = checksum(tensor).item()
        assert checksum(tensor.clone()).item() == before
        for index in range(size):
            for bit in (0, 1, 22, 23, 30, 31):
                flip(tensor, index, bit)
                assert checksum(tensor).item() != before
                flip(tensor, index, bit)
        assert checksum(tensor).item() == before


def test_checksums_are_sums_of_words() -> None:
    tensor = torch.randn(5, 7, generator=torch.Generator().manual_seed(1))
    octets = tensor.numpy().tobytes()
    words = [int.from_bytes(octets[at : at + 8], "little") for at in range(0, 136, 8)]
    expected = (sum(words) + sum(octets[136:])) % 2**64
    assert checksum(tensor).item() % 2**64 == expected
    assert checksum(torch.zeros(0)).item() == 0

import hashlib
import struct
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.order import Permutation, SampleOrder, Skip

WORD = 2**64


def plain_permutation(size: int, key: str) -> list[int]:
    """The same network, one whole number at a time."""
    half = 1
    while 4**half < size:
        half += 1
    round_keys = struct.unpack("<8Q", hashlib.blake2b(key.encode(), digest_size=64).digest())

    def finalise(value: int) -> int:
        value = (value ^ (value >> 33)) * 0xFF51AFD7ED558CCD % WORD
        value = (value ^ (value >> 33)) * 0xC4CEB9FE1A85EC53 % WORD
        return value ^ (value >> 33)

    def encrypt(value: int) -> int:
        left, right = divmod(value, 2**half)
        for round_key in round_keys:
            left, right = right, left ^ (finalise((right + round_key) % WORD) % 2**half)
        return int(left * 2**half + right)

    result = []
    for position in range(size):
        value = encrypt(position)
        while value >= size:
            value = encrypt(value)
        result.append(value)
    return result


@settings(deadline=None)
@given(st.integers(1, 700), st.integers(0, 2**63))
def test_permutation_is_a_bijection_for_every_size(size: int, key: int) -> None:
    assert sorted(Permutation(size, key)(np.arange(size)).tolist()) == list(range(size))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 64, 65, 1000])
def test_permutation_equals_the_plain_network(size: int) -> None:
    permutation = Permutation(size, "epoch", "train", 7, 3)(np.arange(size))
    assert permutation.tolist() == plain_permutation(size, "epoch\0train\x007\x003")


def test_permutation_of_a_huge_range_stays_inside_and_needs_no_memory_for_it() -> None:
    size = 10**12 + 39
    values = Permutation(size, 0)(np.arange(10_000))
    assert len(set(values.tolist())) == 10_000
    assert 0 <= values.min() < size / 100
    assert size * 0.99 < values.max() < size


def test_every_element_is_equally_likely_at_every_position() -> None:
    size, keys = 13, 3000
    table = np.zeros((size, size))
    for key in range(keys):
        table[np.arange(size), Permutation(size, key)(np.arange(size))] += 1
    expected = keys / size
    chi_square = ((table - expected) ** 2 / expected).sum()
    freedom = (size - 1) ** 2
    assert abs(chi_square - freedom) < 4 * np.sqrt(2 * freedom)


def test_neighbours_are_not_kept_together() -> None:
    size = 5000
    order = Permutation(size, 1)(np.arange(size))
    assert np.sum(np.abs(np.diff(order)) == 1) < 12  # 2 expected of a random order
    assert abs(np.corrcoef(order, np.arange(size))[0, 1]) < 4 / np.sqrt(size)


def test_each_epoch_reads_every_sample_once_in_an_order_of_its_own() -> None:
    samples = SampleOrder(37, seed=5)(np.arange(37 * 4)).reshape(4, 37)
    for epoch in samples:
        assert sorted(epoch.tolist()) == list(range(37))
    assert len({tuple(epoch) for epoch in samples.tolist()}) == 4


def test_any_stretch_of_positions_gives_what_the_whole_gives() -> None:
    order = SampleOrder(10, seed=1)
    whole = order(np.arange(60))
    for start in range(0, 53, 7):
        np.testing.assert_array_equal(order(np.arange(start, start + 7)), whole[start : start + 7])
    np.testing.assert_array_equal(order(np.arange(59, -1, -1)), whole[::-1])


def test_seed_and_split_change_the_order() -> None:
    orders = [SampleOrder(50, seed, split)(np.arange(50)) for seed in (0, 1) for split in ("train", "validation")]
    assert len({tuple(order.tolist()) for order in orders}) == 4


@settings(deadline=None)
@given(st.integers(2, 40), st.integers(0, 1000), st.data())
def test_a_skip_changes_the_positions_of_its_sample_and_no_other(size: int, seed: int, data: st.DataObject) -> None:
    skipped = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=min(8, size - 1), unique=True))
    positions = np.arange(2 * size)
    for count in range(1, len(skipped) + 1):
        before = SampleOrder(size, seed, skipped=_skips(skipped[: count - 1]))(positions)
        after = SampleOrder(size, seed, skipped=_skips(skipped[:count]))(positions)
        np.testing.assert_array_equal(before != after, before == skipped[count - 1])
        assert not set(after.tolist()) & set(skipped[:count])


def test_skips_take_the_reserve_in_turn_leaving_out_skipped_ones() -> None:
    size, seed = 200, 3
    plain = SampleOrder(size, seed)(np.arange(size)).tolist()
    reserve = plain_permutation(size, "reserve\0train\x003")
    skipped = [reserve[1], reserve[7], reserve[9]]
    read = SampleOrder(size, seed, skipped=_skips(skipped))(np.arange(size)).tolist()
    assert [read[plain.index(sample)] for sample in skipped] == [reserve[0], reserve[2], reserve[3]]


def test_a_replacement_that_is_skipped_later_is_replaced_in_turn() -> None:
    size, seed = 100, 2
    plain = SampleOrder(size, seed)(np.arange(size)).tolist()
    reserve = plain_permutation(size, "reserve\0train\x002")
    read = SampleOrder(size, seed, skipped=_skips([reserve[5], reserve[0]]))(np.arange(size)).tolist()
    assert Counter(read) == Counter(plain) - Counter([reserve[5], reserve[0]]) + Counter([reserve[1]] * 2)


def test_what_stood_before_the_position_of_a_skip_stays_in_every_epoch_before_it() -> None:
    size = 30
    plain = SampleOrder(size, 4)(np.arange(3 * size))
    bad = int(plain[size + 7])
    first, replacement = Skip(bad, size + 5), int(SampleOrder(size, 4, skipped=[Skip(bad)])(np.array([size + 7]))[0])
    read = SampleOrder(size, 4, skipped=[first])(np.arange(3 * size))
    np.testing.assert_array_equal(read != plain, (plain == bad) & (np.arange(3 * size) >= size + 5))
    again = SampleOrder(size, 4, skipped=[first, Skip(replacement, 2 * size)])(np.arange(3 * size))
    assert again[size + 7] == replacement  # as it was read when nothing was known against it
    np.testing.assert_array_equal(again[: 2 * size], read[: 2 * size])
    assert not {bad, replacement} & set(again[2 * size :].tolist())


def test_naming_a_skipped_sample_twice_is_naming_it_once() -> None:
    positions = np.arange(20)
    once, twice = (SampleOrder(20, 0, skipped=_skips(skipped))(positions) for skipped in ([4, 9], [4, 4, 9, 4]))
    np.testing.assert_array_equal(once, twice)


def test_impossible_skips_are_refused() -> None:
    with pytest.raises(ValueError, match="all 3 samples are skipped"):
        SampleOrder(3, 0, skipped=_skips([0, 1, 2]))
    with pytest.raises(ValueError, match="skipped sample 3 is not one of 3"):
        SampleOrder(3, 0, skipped=_skips([3]))


def _skips(samples: list[int]) -> list[Skip]:
    return [Skip(sample) for sample in samples]

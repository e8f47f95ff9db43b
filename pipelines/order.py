"""The order in which samples are read: a pure function of seed, epoch and position that keeps no state.

Drawing a shuffled index array would cost memory with the corpus and time at every start; a keyed permutation evaluates
any position on its own.
"""

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 8
_RESERVE_BLOCK = 256


class Permutation:
    """A keyed bijection of ``range(size)``: equal keys give equal permutations, on any machine.

    A balanced Feistel network (Luby and Rackoff 1988) over the next power of four, with cycle walking (Black and
    Rogaway, "Ciphers with arbitrary finite domains", 2002) for sizes between. Round keys come from BLAKE2b, the round
    function is MurmurHash3's 64-bit finaliser.
    """

    def __init__(self, size: int, *key: int | str) -> None:
        if size < 1:
            raise ValueError(f"a permutation of {size} elements")
        self._size = size
        half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
        self._half_bits = np.uint64(half_bits)
        self._mask = np.uint64(2**half_bits - 1)
        seed = "\0".join(str(part) for part in key).encode()
        digest = hashlib.blake2b(seed, digest_size=8 * _ROUNDS).digest()
        self._round_keys = np.frombuffer(digest, np.dtype("<u8")).astype(np.uint64)

    def __call__(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Element at each position; positions in ``[0, size)``."""
        values = self._encrypt(positions.astype(np.uint64))
        # At most 4 values of the network's domain fall on one of ours, so this ends after a few rounds.
        while (outside := values >= self._size).any():
            values[outside] = self._encrypt(values[outside])
        return values.astype(np.int64)

    def _encrypt(self, values: NDArray[np.uint64]) -> NDArray[np.uint64]:
        left, right = values >> self._half_bits, values & self._mask
        for key in self._round_keys:
            left, right = right, left ^ (_mix(right + key) & self._mask)
        return (left << self._half_bits) | right


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """MurmurHash3's fmix64."""
    values = (values ^ (values >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
    values = (values ^ (values >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
    return values ^ (values >> np.uint64(33))


class Skip(NamedTuple):
    """A sample that is not to be read any more."""

    sample: int
    position: int = 0
    """From here on; what was read before stays as it was, so that a resumed run repeats it bit for bit."""


class SampleOrder:
    """Which sample stands at each position of the endless sequence of epochs.

    Every epoch holds each of ``num_samples`` samples once, in an order of its own. A sample in ``skipped`` is replaced,
    from its position on and in every epoch, by the next of a reserve order over the same samples that was not skipped
    by then; all other positions stay as they are. A replacement that is skipped later is replaced in turn, so a longer
    list never moves what an earlier skip had settled. Nothing else keeps a sample from coming twice in an epoch after a
    skip.
    """

    def __init__(self, num_samples: int, seed: int, split: str = "train", skipped: Sequence[Skip] = ()) -> None:
        self._num_samples = num_samples
        self._seed = seed
        self._split = split
        self._replacements = self._replace(skipped)

    def __call__(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Sample ids at ``positions`` (from 0, running on over the epochs)."""
        samples = np.empty(len(positions), np.int64)
        epochs, within = np.divmod(positions, self._num_samples)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            order = Permutation(self._num_samples, "epoch", self._split, self._seed, int(epoch))
            samples[here] = order(within[here])
        if self._replacements:
            # Chains end: a replacement is not yet skipped when it is chosen, so each link is newer than the one before.
            for at in np.flatnonzero(np.isin(samples, list(self._replacements))):
                samples[at] = self._instead(int(samples[at]), int(positions[at]))
        return samples

    def _instead(self, sample: int, position: int) -> int:
        while sample in self._replacements:
            from_position, replacement = self._replacements[sample]
            if position < from_position:
                break
            sample = replacement
        return sample

    def _replace(self, skipped: Sequence[Skip]) -> dict[int, tuple[int, int]]:
        """Of each skipped sample: from which position on it is replaced, and by what."""
        if len({skip.sample for skip in skipped}) >= self._num_samples:
            raise ValueError(f"all {self._num_samples} samples are skipped")
        reserve = self._reserve()
        replacements: dict[int, tuple[int, int]] = {}
        for sample, position in skipped:
            if not 0 <= sample < self._num_samples:
                raise ValueError(f"skipped sample {sample} is not one of {self._num_samples}")
            if sample in replacements:
                continue
            candidate = sample
            while candidate == sample or candidate in replacements:
                candidate = next(reserve)
            replacements[sample] = (position, candidate)
        return replacements

    def _reserve(self) -> Iterator[int]:
        """An order over all samples, again and again; drawn in blocks, for a call costs as much for 1 as for 1000."""
        order = Permutation(self._num_samples, "reserve", self._split, self._seed)
        for block in itertools.count():
            yield from order((block * _RESERVE_BLOCK + np.arange(_RESERVE_BLOCK)) % self._num_samples).tolist()

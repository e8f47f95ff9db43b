import math
from collections.abc import Sequence

import pytest
from pydantic import ValidationError

from moe.config.clip import ZClipConfig
from tests.moe.toy import Toy, drawn, norm_of

NORMS = [1.0, 1.3, 0.9, 1.1, 1.05, 1.2, 30.0, 1.0, 0.2, 1.6, 4.0, 1.1]
WARMUP = 4


def reference(norms: Sequence[float], threshold: float, decay: float, max_norm: float | None) -> list[float]:
    """Norms after clipping, as the authors' code has them (z-score mode with adaptive scaling)."""
    seen: list[float] = []
    mean = variance = math.nan
    results = []
    for norm in norms:
        limit = norm
        if len(seen) < WARMUP:
            seen.append(norm)
            if len(seen) == WARMUP:
                mean = sum(seen) / WARMUP
                variance = sum((n - mean) ** 2 for n in seen) / WARMUP
        else:
            z = (norm - mean) / (variance**0.5 + 1e-6)
            if z > threshold:
                limit = mean + threshold * variance**0.5 / (z / threshold)
            mean = decay * mean + (1 - decay) * limit
            variance = decay * variance + (1 - decay) * (limit - mean) ** 2
        results.append(min(limit, max_norm or math.inf))
    return results


@pytest.mark.parametrize("max_norm", [None, 1.15])
def test_norms_are_clipped_as_by_the_authors(max_norm: float | None) -> None:
    toy = Toy(ZClipConfig(decay=0.8, z_threshold=1.5, warmup_steps=WARMUP, max_norm=max_norm))
    direction = drawn(1)
    length = norm_of(list(direction.values()))
    expected = reference(NORMS, threshold=1.5, decay=0.8, max_norm=max_norm)
    assert expected[6] < 2 < NORMS[6]
    for norm, want in zip(NORMS, expected, strict=True):
        clipped, figures = toy.clip({name: g * (norm / length) for name, g in direction.items()})
        assert norm_of(list(clipped.values())) == pytest.approx(want, rel=1e-5)
        assert figures["clip_factor"] == pytest.approx(want / norm, rel=1e-5)
        assert figures["clipped"] == float(want < norm)


def test_state_moves_the_future_and_nothing_else_does() -> None:
    first, second = (Toy(ZClipConfig(warmup_steps=2, z_threshold=0.5, max_norm=None)) for _ in range(2))
    for seed in range(4):
        first.clip(drawn(seed))
    for name, tensor in second.technique.state().items():
        tensor.copy_(first.technique.state()[name])
    spike = drawn(9, scale=5.0)
    assert second.clip(spike)[1] == first.clip(spike)[1]
    assert first.clip(spike)[1]["clipped"] == 1.0


def test_fewer_than_two_norms_have_no_deviation() -> None:
    with pytest.raises(ValidationError, match="warmup_steps"):
        ZClipConfig(warmup_steps=1)

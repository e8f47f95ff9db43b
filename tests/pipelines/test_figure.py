import pytest

from moe.config.clip import (
    AdaGcClipConfig,
    ClipConfig,
    GlobalClipConfig,
    GroupClipConfig,
    NoClipConfig,
    SpamClipConfig,
    StableSpamClipConfig,
    ZClipConfig,
)
from pipelines.figure import clip_line


@pytest.mark.parametrize(
    ("clip", "line"),
    [
        (GlobalClipConfig(max_norm=0.5), 0.5),
        (ZClipConfig(max_norm=2.0), 2.0),
        (ZClipConfig(max_norm=None), None),
        # A limit on a part of the gradient is none on the whole, whose norm the picture shows.
        (GroupClipConfig(), None),
        (AdaGcClipConfig(), None),
        (SpamClipConfig(), None),
        (StableSpamClipConfig(), None),
        (NoClipConfig(), None),
    ],
)
def test_the_line_is_the_limit_of_the_global_norm(clip: ClipConfig, line: float | None) -> None:
    assert clip_line(clip) == line

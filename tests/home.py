"""A STEADYMOE_HOME that several tests share; one of a test's own is a fixture of its folder."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pipelines.home import HOME_VARIABLE
from pipelines.tracking_store import URI_VARIABLE


@contextmanager
def home_at(path: Path) -> Iterator[Path]:
    """``path`` is it for the while, and no other tracking store is named."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(HOME_VARIABLE, str(path))
        patch.delenv(URI_VARIABLE, raising=False)
        yield path

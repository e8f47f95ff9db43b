from collections.abc import Iterator

import pytest

from pipelines.tracking_store import TrackingStore, local_database, open_store
from tests.home import home_at


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrackingStore]:
    """A STEADYMOE_HOME with its database for all tests of a file; making one takes seconds."""
    with home_at(tmp_path_factory.mktemp("home")):
        yield open_store(local_database())

from collections.abc import Iterator

import pytest

from tests.infra.local_cluster import LocalCluster


# Not for the whole session: a head takes memory and a part of a core from the tests after this folder's.
@pytest.fixture(scope="package")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    """A running Ray head and MLflow server for all tests that only use them."""
    found = LocalCluster(tmp_path_factory.mktemp("home"))
    try:
        found.up()
        yield found
    finally:
        found.run("down")

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines import tracking
from pipelines.home import HOME_VARIABLE
from pipelines.prepare import prepare
from pipelines.shards import Shards
from pipelines.tracking_store import URI_VARIABLE, TrackingStore, local_database, open_store
from tests.pipelines.mlflow_server import Server
from tests.pipelines.plain_corpus import PlainCorpus, write_corpus


@pytest.fixture(autouse=True)
def _patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests expect everything delivered at a run's end; on a loaded machine that may take longer than a user waits."""
    monkeypatch.setattr(tracking, "FINISH_TIMEOUT_S", 120.0)


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tracking database with all its tables and nothing in them; making one takes seconds."""
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    open_store(f"sqlite:///{path}")
    return path


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A STEADYMOE_HOME of the test's own."""
    monkeypatch.setenv(HOME_VARIABLE, str(tmp_path))
    monkeypatch.delenv(URI_VARIABLE, raising=False)
    return tmp_path


@pytest.fixture
def store(home: Path, empty_database: Path) -> TrackingStore:
    """The local tracking database under ``home``."""
    shutil.copy(empty_database, home / "mlflow.db")
    return open_store(local_database())


@pytest.fixture
def server(home: Path, tmp_path: Path) -> Iterator[Server]:
    """A tracking server of the test's own."""
    server = Server(tmp_path / "server.db", tmp_path / "server.log")
    server.start()
    yield server
    server.kill()


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> PlainCorpus:
    """Texts of known tokens."""
    return write_corpus(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="module")
def shards(plain: PlainCorpus, tmp_path_factory: pytest.TempPathFactory) -> Shards:
    """The same, prepared."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STEADYMOE_HOME", str(tmp_path_factory.mktemp("home")))
        return prepare(plain.config(), shard_bytes=1000)

"""A tracking server that dies while a run is on: training does not notice, and nothing is lost or doubled."""

from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from mlflow import MlflowClient

from tests.pipelines.driver import Driver, await_steps, sets
from tests.pipelines.mlflow_server import Server
from tests.pipelines.small_run import metrics_of

pytestmark = pytest.mark.slow

STEPS = 900


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path / "server.db", tmp_path / "server.log")
    server.start()
    yield server
    server.kill()


def _talk_to(port: int, processes: list[psutil.Process]) -> list[int]:
    """Which of these processes have, or try for, a connection to the port."""
    return [p.pid for p in processes if any(c.raddr and c.raddr.port == port for c in p.net_connections())]


def test_a_server_dead_for_a_third_of_a_run_costs_training_nothing(home: Path, server: Server) -> None:
    settings = sets(
        f"schedule.steps={STEPS}",
        "data.global_batch_size=32",
        "validation.every_steps=450",
        f"tracking.uri={server.uri}",
    )
    with Driver(home, "train", "micro", *settings, "--set", "tracking.run_name=run") as driver:
        folder = await_steps("run", STEPS // 5)
        server.kill()
        # The training processes have no part in tracking: they write a file, and hold no connection to lose.
        workers = driver.workers()
        assert len(workers) == 1
        assert _talk_to(server.port, workers) == []
        # Dead for a third of the run. What follows is long enough for the server to be up again before the end.
        await_steps("run", STEPS // 5 + STEPS // 3)
        assert _talk_to(server.port, workers) == []
        assert [worker for worker in workers if not worker.is_running()] == []
        server.start()
        assert driver.wait() == 0, driver.output()
    assert "could not be delivered" not in driver.output()
    recorded = metrics_of(folder.path)
    client = MlflowClient(server.uri)
    assert client.get_run(folder.info.id).info.status == "FINISHED"
    for metric in ("train/loss", "train/grad_norm", "train/lr"):
        arrived = [(point.step, point.value) for point in client.get_metric_history(folder.info.id, metric)]
        assert sorted(arrived) == [(step, recorded[step][metric]) for step in range(1, STEPS + 1)]

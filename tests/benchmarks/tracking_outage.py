"""What a dead tracking server costs training: the speed of steps while it is dead, against that while it answers.

    python -m tests.benchmarks.tracking_outage [ROUNDS]

One run of the preset micro on one worker. The server is killed and started again in turns, so that both halves see the
same machine. Printed are the medians of tokens per second with their quartiles, and the ratio of the medians.
"""

import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from statistics import median, quantiles

from pipelines.spool import TRAIN, SpoolReader
from tests.pipelines.driver import Driver, await_steps, sets
from tests.pipelines.mlflow_server import Server

_TURN_S = 20.0
# What a turn begins with belongs to neither side: the server starts, the backlog is sent, the driver finds out.
_SETTLING_S = 5.0
_SETTINGS = ("data.global_batch_size=32", "schedule.steps=1000000", "checkpoint.every_steps=0",
             "validation.every_steps=1000000", "tracking.run_name=outage")  # fmt: skip


class _Speeds:
    """Tokens per second of the steps of a stretch of time."""

    def __init__(self, spool: Path) -> None:
        self._reader = SpoolReader(spool)

    def during(self, seconds: float) -> list[float]:
        self._reader.read()
        time.sleep(seconds)
        records = [record for record in self._reader.read() if record.kind == TRAIN]
        return [record.metrics["train/tokens_per_second"] for record in records]


def main(rounds: int) -> None:
    """Run the benchmark and print the ratio."""
    with tempfile.TemporaryDirectory(prefix="outage-") as folder:
        home = Path(folder) / "home"
        os.environ["STEADYMOE_HOME"] = str(home)
        server = Server(Path(folder) / "server.db", Path(folder) / "server.log")
        server.start()
        answers: list[float] = []
        dead: list[float] = []
        try:
            with Driver(home, "train", "micro", *sets(*_SETTINGS, f"tracking.uri={server.uri}")) as driver:
                speeds = _Speeds(await_steps("outage", 50).spool)
                for turn in range(rounds):
                    time.sleep(_SETTLING_S)
                    answers += speeds.during(_TURN_S)
                    server.kill()
                    time.sleep(_SETTLING_S)
                    dead += speeds.during(_TURN_S)
                    server.start()
                    print(f"round {turn + 1} of {rounds}", flush=True)
                driver.process.send_signal(signal.SIGTERM)
                driver.wait()
        finally:
            server.kill()
    print(f"server answers: {median(answers):8,.0f} tokens/s, quartiles {_quartiles(answers)}, {len(answers)} steps")
    print(f"server dead:    {median(dead):8,.0f} tokens/s, quartiles {_quartiles(dead)}, {len(dead)} steps")
    print(f"ratio dead / answers: {median(dead) / median(answers):.3f}")


def _quartiles(values: list[float]) -> str:
    low, _, high = quantiles(values, n=4)
    return f"{low:,.0f} to {high:,.0f}"


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 4)

"""A head for tests of what talks to one: a process that only sleeps, and a dashboard that answers as it is told."""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

from infra.cluster_state import Head, ensure_token
from infra.processes import end, start


class FakeDashboard:
    """Takes requests on a thread; tests change what it holds and what it does next."""

    def __init__(self) -> None:
        self.entries: list[dict[str, Any]] = []
        """As Ray lists jobs and drivers."""
        self.failures: list[str] = []
        """What becomes of the next requests: ``error`` is status 500, ``cut`` half an answer, ``silence`` none."""
        self.requests: list[str] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    def add_job(self, job_id: str, status: str = "RUNNING") -> None:
        job = {"submission_id": job_id, "status": status, "entrypoint": "work", "start_time": 1000, "end_time": None}
        self.entries.append({**job, "type": "SUBMISSION"})

    def add_driver(self, pid: int) -> None:
        driver = {"submission_id": None, "status": "RUNNING", "entrypoint": "python work.py", "start_time": 1000}
        self.entries.append({**driver, "type": "DRIVER", "driver_info": {"pid": str(pid)}})

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, method: str, path: str) -> Any:
        if method == "POST":
            for entry in self.entries:
                if path == f"/api/jobs/{entry['submission_id']}/stop":
                    entry["status"] = "STOPPED"
        return self.entries

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        dashboard = self

        class Handler(BaseHTTPRequestHandler):
            def handle_one(self) -> None:
                dashboard.requests.append(f"{self.command} {self.path}")
                failure = dashboard.failures.pop(0) if dashboard.failures else ""
                if failure == "silence":
                    return
                if failure == "error":
                    self.send_error(500)
                    return
                content = json.dumps(dashboard._answer(self.command, self.path)).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(content) + 100 * (failure == "cut")))
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_POST = handle_one

            def log_message(self, *_: Any) -> None:
                pass

        return Handler


@contextmanager
def fake_head(folder: Path) -> Iterator[tuple[Head, FakeDashboard]]:
    """A living head under the STEADYMOE_HOME of the test, and its dashboard."""
    ensure_token()
    dashboard = FakeDashboard()
    sleeper = [sys.executable, "-c", "import time; time.sleep(600)"]
    service = start(sleeper, os.environ, f"test-{folder}", dashboard.port, folder / "head.log")
    try:
        yield Head(**vars(service), gcs_port=1, temp_dir=str(folder / "ray")), dashboard
    finally:
        end(service)
        dashboard.close()

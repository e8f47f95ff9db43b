"""A Ray head's dashboard over HTTP: its jobs and the use of its CPUs, without the second that importing Ray takes."""

import json
import time
import urllib.request
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any

import psutil

ENDED = frozenset({"STOPPED", "SUCCEEDED", "FAILED"})

_TIMEOUT_S = 10


@dataclass(frozen=True)
class Job:
    """A submitted job."""

    id: str
    status: str
    """PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED."""
    entrypoint: str
    started: float
    """Seconds since 1970."""
    ended: float | None
    exit_code: int | None

    @property
    def seconds(self) -> float:
        """How long it has run."""
        return (self.ended or time.time()) - self.started

    @property
    def over(self) -> bool:
        """Whether it has ended."""
        return self.status in ENDED


@dataclass(frozen=True)
class Driver:
    """A process that is connected to the head and runs, and is no submitted job."""

    pid: int
    entrypoint: str
    started: float
    """Seconds since 1970."""

    @property
    def seconds(self) -> float:
        """How long it has run."""
        return time.time() - self.started


class DashboardError(Exception):
    """The dashboard does not answer, or not as expected."""


@dataclass(frozen=True)
class Dashboard:
    """The dashboard at an address, with the file of the token that it asks for."""

    address: str
    token_file: Path

    def jobs(self) -> list[Job]:
        """All submitted jobs of the head, in the order in which they came."""
        found = [_job(entry) for entry in self._ask("GET", "/api/jobs/") if entry.get("submission_id")]
        return sorted(found, key=lambda job: job.started)

    def drivers(self) -> list[Driver]:
        """The living drivers that nobody submitted, in the order in which they came."""
        running = [e for e in self._ask("GET", "/api/jobs/") if e["type"] == "DRIVER" and e["status"] == "RUNNING"]
        found = [Driver(int(e["driver_info"]["pid"]), e["entrypoint"], e["start_time"] / 1000) for e in running]
        # Of one that was killed Ray may not know yet.
        return sorted((d for d in found if psutil.pid_exists(d.pid)), key=lambda driver: driver.started)

    def stop(self, job_id: str) -> None:
        """Ask a job to end; returns at once."""
        self._ask("POST", f"/api/jobs/{job_id}/stop")

    def cpus(self) -> tuple[float, float] | None:
        """CPUs that jobs hold, and all CPUs; None in the first seconds of a head."""
        status = self._ask("GET", "/api/cluster_status")["data"].get("clusterStatus") or {}
        usage = (status.get("loadMetricsReport") or {}).get("usage") or {}
        return (float(usage["CPU"][0]), float(usage["CPU"][1])) if "CPU" in usage else None

    def is_ready(self) -> bool:
        """Whether jobs can be submitted."""
        try:
            self._ask("GET", "/api/jobs/")
        except DashboardError:
            return False
        return True

    def _ask(self, method: str, path: str) -> Any:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            token = self.token_file.read_text(encoding="utf-8").strip()
            request = urllib.request.Request(
                self.address + path, method=method, headers={"Authorization": f"Bearer {token}"}
            )
            with opener.open(request, timeout=_TIMEOUT_S) as answer:
                return json.load(answer)
        except (OSError, ValueError, HTTPException) as error:
            raise DashboardError(f"{self.address}: {error}") from error


def _job(entry: dict[str, Any]) -> Job:
    ended = entry.get("end_time")
    return Job(
        id=entry["submission_id"],
        status=entry["status"],
        entrypoint=entry["entrypoint"],
        started=entry["start_time"] / 1000,
        ended=ended / 1000 if ended else None,
        exit_code=entry.get("driver_exit_code"),
    )

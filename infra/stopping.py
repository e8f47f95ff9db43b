"""What `steadymoe down` does before it ends a head: jobs are given time to save, and other work is not taken along."""

import sys
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from infra.cluster_state import Head
from infra.dashboard import Dashboard, DashboardError, Driver
from infra.ray_head import stop_wait_s
from pipelines.errors import UserError

# Ray kills a job after its time, and takes some seconds to say so.
_STOP_MARGIN_S = 30
# Of a driver that has just ended Ray does not know at once.
_DRIVER_ENDS_S = 5.0
_POLL_S = 0.2
_STILL_EVERY_S = 10.0

Answer = TypeVar("Answer")


def stop_work(head: Head, dashboard: Dashboard) -> None:
    """Stop the jobs of a head; returns when they have ended, the head has, or their time is over.

    A dashboard that does not answer is asked again: one slow answer is no reason to kill a job that would save.

    Raises:
        UserError: drivers work on the head that are no jobs, so that nothing here could make them save. No job was
            stopped then.
    """
    deadline = time.monotonic() + stop_wait_s(head) + _STOP_MARGIN_S
    _refuse_drivers(_answers(head, dashboard.drivers, deadline))
    _stop_jobs(head, dashboard, deadline)


def _refuse_drivers(answers: Iterator[list[Driver]]) -> None:
    began: float | None = None
    for drivers in answers:
        if not drivers:
            return
        began = began or time.monotonic()
        if time.monotonic() - began > _DRIVER_ENDS_S:
            named = ", ".join(f"{driver.pid} ({driver.entrypoint[:80]})" for driver in drivers)
            raise UserError(f"down would end processes that work on the Ray head, unsaved; end them first: {named}")


def _stop_jobs(head: Head, dashboard: Dashboard, deadline: float) -> None:
    began = told = time.monotonic()
    running: set[str] | None = None
    asked: set[str] = set()
    problem = ""
    for jobs in _answers(head, dashboard.jobs, deadline):
        before, running = running or set(), {job.id for job in jobs if not job.over}
        for job_id in sorted(before - running):
            print(f"job {job_id} has ended after {time.monotonic() - began:.0f} s", flush=True)
        for job_id in sorted(running - before):
            print(f"stopping job {job_id}, which saves first ...", flush=True)
        for job_id in sorted(running - asked):
            try:
                dashboard.stop(job_id)
                asked.add(job_id)
            except DashboardError as error:
                problem = f" ({job_id} could not be asked yet: {error})"
        if not running:
            return
        if time.monotonic() - told > _STILL_EVERY_S:
            told = time.monotonic()
            print(f"waiting for {len(running)} job(s) to save, {told - began:.0f} s ...{problem}", flush=True)
            problem = ""
    if head.alive:
        what = "does not answer" if running is None else f"still has {len(running)} job(s)"
        print(f"The Ray head {what}; it is ended with whatever runs on it.", file=sys.stderr)


def _answers(head: Head, ask: Callable[[], Answer], deadline: float) -> Iterator[Answer]:
    """What the dashboard answers, again and again while the head lives, until the deadline."""
    told = time.monotonic()
    while head.alive and time.monotonic() < deadline:
        try:
            answer = ask()
        except DashboardError as error:
            if time.monotonic() - told > _STILL_EVERY_S:
                told = time.monotonic()
                print(f"the Ray head does not answer ({error}); asking again ...", file=sys.stderr, flush=True)
        else:
            yield answer
        time.sleep(_POLL_S)

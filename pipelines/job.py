"""What a driver knows of the Ray job that it is, if it was submitted as one."""

import json
import os
import re
from collections.abc import Callable

from pipelines.command_line import EXIT_DEFECT, EXIT_INTERRUPTED

JOB_TAG = "ray.job_id"
"""Tag of a run: the submission id of the job that trains it, as ``ray job list`` shows it."""

# Set by Ray for the drivers of submitted jobs (ray/dashboard/modules/job/job_supervisor.py).
_JOB_CONFIG_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"
_SUBMISSION_ID = "job_submission_id"

_EXIT_LINE = re.compile(r"^steadymoe: exit code (\d+)$", re.MULTILINE)


def submission_id() -> str | None:
    """The id under which this process was submitted (``raysubmit_...``); None if it is not a job's driver."""
    config = json.loads(os.environ.get(_JOB_CONFIG_VARIABLE) or "{}")
    found = config.get("metadata", {}).get(_SUBMISSION_ID)
    return str(found) if found else None


def job_tags() -> dict[str, str]:
    """Tags that lead from a run in MLflow to its job."""
    found = submission_id()
    return {JOB_TAG: found} if found else {}


def run_in_job(main: Callable[[], int]) -> int:
    """Run a driver's ``main``; its last line in a job's log says its exit code.

    Ray keeps the code of a driver that ended by itself, but of one that it was asked to stop it tells only that.
    """
    if submission_id() is None:
        return main()
    code = EXIT_DEFECT
    try:
        code = main()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else EXIT_DEFECT if stop.code else 0
        raise
    except KeyboardInterrupt:
        code = EXIT_INTERRUPTED
        raise
    finally:
        print(f"steadymoe: exit code {code}", flush=True)
    return code


def exit_code_in(log: str) -> int | None:
    """The last exit code that a job's log tells; None if the driver did not come to write it."""
    found = _EXIT_LINE.findall(log)
    return int(found[-1]) if found else None

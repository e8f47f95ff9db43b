"""This wing's commands up to the point where torch, ray and mlflow are needed (their import alone takes seconds)."""

from pathlib import Path

from pipelines.arguments import DeliverArguments, ExportArguments, PrepareArguments, TrainArguments
from pipelines.command_line import EXIT_DONE
from pipelines.errors import UserError
from pipelines.loading import dump_config
from pipelines.spike_arguments import RunsArguments, SpikesArguments


def train(arguments: TrainArguments) -> int:
    """One training run; returns the exit code.

    Raises:
        UserError: the config does not hold, or the run to resume cannot be.
    """
    if arguments.resume is None:
        config = arguments.config()
        if arguments.print_config:
            print(dump_config(config), end="")
            return EXIT_DONE
    from pipelines.train import run

    return run(arguments)


def deliver(arguments: DeliverArguments) -> int:
    """Deliver to MLflow what it lacks of a run, the trials of a study or sweep included; returns the exit code.

    Raises:
        UserError: there is no such run, or the tracking store does not take everything.
    """
    from pipelines.delivery import deliver as deliver_run
    from pipelines.home import runs_dir
    from pipelines.run_folder import find_folder, parent_folders, run_folders, sweep_folders, unknown_trials
    from pipelines.spike_words import counted

    runs = list(run_folders())
    folder = find_folder(arguments.run, [*runs, *parent_folders()], "run", "runs", runs_dir())
    trials = [run for run in runs if run.info.parent == folder.info.id and not run.is_delivered]
    for each in (folder, *trials):
        if left := deliver_run(each):
            raise UserError(left)
    also = f" and {len(trials)} of its trials" if trials else ""
    print(f"MLflow has everything that run {folder.info.name}{also} recorded.")
    if folder in sweep_folders() and (unknown := unknown_trials(folder)):
        name, told = folder.info.name, counted(unknown, "trial")
        raise UserError(
            f"{told} of sweep {name} began while MLflow was away, and cannot be sent alone; "
            f"`steadymoe sweep --resume {name}` tells it"
        )
    return EXIT_DONE


def prepare(arguments: PrepareArguments) -> int:
    """Prepare a folder of token shards; returns the exit code.

    Raises:
        UserError: input, tokenizer or folder do not allow it.
    """
    from pipelines.prepared import run

    return run(arguments)


def export(arguments: ExportArguments) -> int:
    """Write a run's model as a Hugging Face folder; returns the exit code.

    Raises:
        UserError: no such run or checkpoint, a model without counterpart there, or a folder that cannot be written.
    """
    from pipelines.export import export as export_run
    from pipelines.run_folder import find_run

    print(export_run(find_run(arguments.run), Path(arguments.to).expanduser(), arguments.step, arguments.dtype))
    return EXIT_DONE


def runs(arguments: RunsArguments) -> int:
    """List the runs; returns the exit code."""
    from pipelines.run_list import print_runs

    print_runs(arguments.limit, arguments.trials)
    return EXIT_DONE


def spikes(arguments: SpikesArguments) -> int:
    """List the events of a run, or show one; returns the exit code.

    Raises:
        UserError: there is no such run or event.
    """
    from pipelines.run_folder import find_run
    from pipelines.spike_event import read_events
    from pipelines.spike_list import event_as_json, events_as_json, find_event, print_events

    folder = find_run(arguments.run)
    if not arguments.event:
        if arguments.as_json:
            print(events_as_json(read_events(folder.events)))
        else:
            print_events(folder)
        return EXIT_DONE
    number, event = find_event(folder, arguments.event[0])
    if arguments.as_json:
        print(event_as_json(number, event))
        return EXIT_DONE
    from pipelines.spike_page import print_event

    print_event(folder, number, event, arguments.full)
    return EXIT_DONE

"""How every command reads its arguments and ends: from pydantic classes, with one clear line for a user's mistake.

The arguments are made from the classes by pydantic-settings. What it leaves open is set here once: values of lists are
taken as they stand (it would split ``--set key=[1,2]`` at the comma), options may stand between positional arguments,
environment variables are not read, and a mistake is a `UserError`.
"""

import errno
import json
import re
import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from inspect import cleandoc
from typing import Any, NoReturn, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings, CliApp, CliSettingsSource, PydanticBaseSettingsSource, get_subcommand

from pipelines.errors import UserError
from pipelines.home import home

EXIT_DONE = 0
EXIT_DEFECT = 1
EXIT_USER_ERROR = 2
EXIT_ENDED_BY_POLICY = 3
EXIT_INTERRUPTED = 130

Arguments = TypeVar("Arguments", bound=BaseModel)

# The library would show the type: --set list[str].
_METAVARS = {
    "--set": "KEY=VALUE",
    "--resume": "RUN",
    "--init-from": "DIR",
    "--to": "DIR",
    "--step": "N",
    "--out": "PATH",
    "--field": "NAME",
    "--separator": "TEXT",
    "--tokenizer": "FILE",
    "--document-token": "TOKEN",
    "--train-tokenizer": "VOCAB_SIZE",
    "--tasks": "N",
    "--limit": "N",
    "--watch": "JOB",
    "--address": "URL",
    "--budget-minutes": "MINUTES",
    "--blocks": "N",
    "--trials": "N",
    "--findings": "FILE",
    "--with": "TREATMENT",
    "--after": "STEPS",
}
# And (default: []), (default: None), (default: ['tiny']).
_EMPTY_DEFAULT = re.compile(r" \(default: (\[\]|None|null)\)$")
_LIST_DEFAULT = re.compile(r"\(default: \['(.*)'\]\)$")


def run_command(
    model: type[Arguments], execute: Callable[[Arguments], int], argv: Sequence[str] | None, program: str
) -> int:
    """Parse the arguments of a command, execute it, and return its exit code.

    Args:
        model: class of the arguments; its docstring is the help.
        execute: the command; a `UserError` from it becomes a message on stderr and exit code 2, a full disk one and 1.
        argv: arguments without the program's name; None takes those of the process.
        program: name in the help.
    """
    arguments = None
    try:
        arguments = parse(model, sys.argv[1:] if argv is None else argv, program)
        return execute(arguments)
    except UserError as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        return EXIT_USER_ERROR
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        place = f" at {error.filename}" if error.filename else f" in {home()}"
        print(f"error: no space left on the disk{place}; free some, then {_remedy(arguments)}", file=sys.stderr)
        return EXIT_DEFECT
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED


def _remedy(arguments: BaseModel | None) -> str:
    """How a command goes on that was cut short."""
    command = (arguments and get_subcommand(arguments, is_required=False)) or arguments
    return "go on with --resume NAME" if hasattr(command, "resume") else "give the command again"


def parse(model: type[Arguments], argv: Sequence[str], program: str) -> Arguments:
    """Read a command's arguments.

    Raises:
        UserError: an argument is unknown, missing or wrong.
        SystemExit: ``--help`` was answered.
    """
    settings = type(model.__name__, (_Settings, model), {"__doc__": model.__doc__})
    source: CliSettingsSource[_Parser] = CliSettingsSource(
        settings,
        root_parser=_Parser(
            prog=program,
            description=cleandoc(model.__doc__ or ""),
            formatter_class=RawDescriptionHelpFormatter,
            allow_abbrev=False,
        ),
        parse_args_method=_parse_args,
        add_argument_method=_add_argument,
        add_parser_method=_add_parser,
        cli_kebab_case=True,
        cli_avoid_json=True,
        cli_hide_none_type=True,
    )
    try:
        return CliApp.run(settings, cli_args=list(argv), cli_settings_source=source)
    except ValidationError as error:
        raise UserError("\n".join(_problem(found) for found in error.errors(include_url=False))) from None


def _problem(found: ErrorDetails) -> str:
    """What is wrong with the value of one option; a subcommand's name stands before the option's."""
    option = f"--{str(found['loc'][-1]).replace('_', '-')}"
    if found["type"] == "missing":
        return f"{option} is required"
    return f"{option} {found['input']}: {found['msg'].replace('Input should', 'should', 1)}"


class _Settings(BaseSettings):
    """Arguments come from the command line alone: a variable named ``presets`` must not start another run."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (init_settings,)


class _Parser(ArgumentParser):
    """Lets options stand between positional arguments, and raises a `UserError` instead of exiting."""

    _intermixing = False

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        # Intermixed parsing calls this method again, and does not know subcommands (whose own parsers come here too).
        if self._intermixing or self._subparsers is not None:
            return super().parse_known_args(args, namespace)
        self._intermixing = True
        return self.parse_known_intermixed_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


def _parse_args(parser: ArgumentParser, args: Sequence[str], namespace: Namespace | None = None) -> Namespace:
    parsed = parser.parse_args(args, namespace)
    for name, value in vars(parsed).items():
        if isinstance(value, list):
            setattr(parsed, name, json.dumps(value))
    return parsed


def _add_argument(parser: ArgumentParser, *names: str, **options: Any) -> Any:
    options["help"] = _LIST_DEFAULT.sub(r"(default: \1)", _EMPTY_DEFAULT.sub("", options["help"]))
    if names[0] in _METAVARS:
        options["metavar"] = _METAVARS[names[0]]
    return parser.add_argument(*names, **options)


def _add_parser(subcommands: Any, name: str, **options: Any) -> Any:
    options["description"] = cleandoc(options["description"])
    return subcommands.add_parser(name, **options)

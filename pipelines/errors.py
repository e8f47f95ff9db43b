"""Errors that a user can mend."""

import re

_CREDENTIALS = re.compile(r"//[^/\s]*@")


class UserError(Exception):
    """The user's input is wrong. The message is one line that names the key or file and says what would be right.

    The command line prints it without a traceback and exits with code 2.
    """


class InputError(UserError):
    """A file of a corpus cannot be read as what it is taken for.

    Args:
        path: the file.
        problem: what is wrong, and what would be right.
        unit: ``line`` or ``row`` if there is a place to name.
        number: which one it is.
    """

    def __init__(self, path: str, problem: str, unit: str = "", number: int = 0) -> None:
        # All of them as the exception's arguments: it travels from the task that found it to the driver.
        super().__init__(path, problem, unit, number)
        self.path = path
        self.problem = problem
        self.unit = unit
        self.number = number

    def __str__(self) -> str:
        """The line for the user."""
        place = f", {self.unit} {self.number}" if self.unit else ""
        return f"{self.path}{place}: {self.problem}"

    def moved(self, units: int) -> "InputError":
        """The same for a place that was counted from the middle of its file, ``units`` after the start."""
        return InputError(self.path, self.problem, self.unit, self.number + units) if self.unit else self


def first_line(error: BaseException, limit: int = 300) -> str:
    """The beginning of an error's message, without the credentials that a URI in it may hold."""
    lines = str(error).strip().splitlines()
    return _CREDENTIALS.sub("//", lines[0])[:limit] if lines else type(error).__name__

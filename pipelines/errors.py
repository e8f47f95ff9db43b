"""Errors that a user can mend."""


class UserError(Exception):
    """The user's input is wrong. The message is one line that names the key or file and says what would be right.

    The command line prints it without a traceback and exits with code 2.
    """

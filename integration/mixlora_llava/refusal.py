"""Errors that the user of a command can fix."""


class Refusal(ValueError):
    """An input cannot be used. The message says what was given, what is needed and what to do. The command prints it
    without a traceback."""


class Missing(Refusal, FileNotFoundError):
    """A file, folder or model does not exist."""

"""Errors that the person who gave a command can mend."""


class Refusal(ValueError):
    """What was given cannot be used. The message says what it is, what is needed and what to do; the command prints it
    without a traceback."""


class Missing(Refusal, FileNotFoundError):
    """A file, folder or model that was named is not there."""

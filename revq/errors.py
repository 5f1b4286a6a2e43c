"""Separate because every module raises `InputError` and this file imports nothing: the exception for unusable input."""


class InputError(ValueError):
    """A file, folder, checkpoint or option that the user gave cannot be used; the message names it and says why.

    The command line prints the message as one line and exits with code 2.
    """

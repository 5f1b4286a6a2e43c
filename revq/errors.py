"""The one exception that means "the user's input is wrong"; the command line turns it into one line and exit code 2."""


class InputError(ValueError):
    """A file, folder, checkpoint or option that the user gave cannot be used; the message names it and says why."""

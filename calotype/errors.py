"""The one kind of error that is meant for a person's eyes."""


class UserError(ValueError):
    """A one-line message that names the flag or file, the value and the way out; the command line exits with 2."""

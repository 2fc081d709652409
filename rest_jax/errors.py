"""Errors that the command line prints as one line: input to be mended (exit code 2), a run that stopped (exit code 1).

Everything else that is raised is a defect of the program and keeps its traceback.
"""


class UserError(ValueError):
    """Input that cannot be used; the text names the thing, its value and the remedy, on one line."""


class RunStopped(RuntimeError):
    """A run that ended itself because going on would be useless; the text says why and what was saved."""


UNFINISHED = 75  # exit code of a run that was told to stop and has saved (EX_TEMPFAIL of sysexits.h: try again)

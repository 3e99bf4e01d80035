"""Errors that a user can mend.

Everything derived from `UserError` is told in one line (what, where, what was expected, what to do) and ends
the command with exit code 2. Anything else that escapes is a defect of ours and shows its traceback.
"""

import errno


class UserError(Exception):
    """Base of all errors that are the input's, not the program's."""


class ConfigError(UserError):
    """A recipe, spec, profile or `--set` that cannot be used."""


class SlideError(UserError):
    """A slide table, or one slide in it."""


class StoreError(UserError):
    """A tile store or the tiles below it."""


class BadTileError(StoreError):
    """A tile that is missing or cannot be decoded; a loader takes another one for it."""


class UnreachableTileError(BadTileError):
    """A tile whose server does not answer; where its substitutes are so, too, nothing can be read any more."""


class ScheduleError(UserError):
    """A schedule, or a spec that cannot be met."""


class RunError(UserError):
    """A run folder, a checkpoint, or a job."""


class FeatureError(UserError):
    """A feature file, or a set of them."""


class SplitError(UserError):
    """A split file, or a target that cannot be split."""


def describe_os_error(error: OSError) -> str:
    """Say in one line where an error of the operating system struck and what to do.

    >>> describe_os_error(OSError(errno.ENOSPC, "No space left on device", "out/x"))
    'out/x: the disk is full; free some space or choose another --out, then run the same command again'
    """
    output = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
    where = error.filename or ("the output folder" if output else "an operation of the system")
    space = "free some space or choose another --out, then run the same command again"
    denied = "permission denied; make it readable (an output: writable) for this user"
    advice = {
        errno.ENOSPC: f"the disk is full; {space}",
        errno.EDQUOT: f"the quota is used up; {space}",
        errno.EACCES: denied,
        errno.EPERM: denied,
        errno.EROFS: "the file system is read-only; choose another --out",
        errno.ENOENT: "no such file or folder",
        errno.ENOTDIR: "not a folder",
        errno.EEXIST: "already exists",
    }.get(error.errno or 0, error.strerror or str(error))
    return f"{where}: {advice}"

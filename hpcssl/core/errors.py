"""Errors that a user can mend.

Everything derived from `UserError` is told in one line (what, where, what was expected, what to do) and ends
the command with exit code 2. Anything else that escapes is a defect of ours and shows its traceback.
"""


class UserError(Exception):
    """Base of all errors that are the input's, not the program's."""


class ConfigError(UserError):
    """A recipe, spec, profile or `--set` that cannot be used."""


class SlideError(UserError):
    """A slide table, or one slide in it."""


class StoreError(UserError):
    """A tile store or the tiles below it."""


class ScheduleError(UserError):
    """A schedule, or a spec that cannot be met."""


class RunError(UserError):
    """A run folder, a checkpoint, or a job."""


class FeatureError(UserError):
    """A feature file, or a set of them."""


class SplitError(UserError):
    """A split file, or a target that cannot be split."""

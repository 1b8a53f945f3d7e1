"""Errors of a training run that its user can fix."""


class TrainingError(Exception):
    """The run cannot go on; the message is the one line that the user reads."""


class DataError(TrainingError):
    """A folder or an image cannot be used; the message begins with its path."""


class CheckpointError(TrainingError):
    """A file of weights or a checkpoint cannot be read or does not fit; the message begins with its path."""

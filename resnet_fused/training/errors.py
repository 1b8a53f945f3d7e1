"""What may go wrong with a training run for a reason that its user can mend."""


class TrainingError(Exception):
    """The run cannot go on; the message is the one line that its user reads."""


class DataError(TrainingError):
    """A folder or an image is not what it must be; the message begins with its path."""


class CheckpointError(TrainingError):
    """A file of weights or a checkpoint cannot be read or does not fit; the message begins with its path."""

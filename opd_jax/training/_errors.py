"""What can end a run, told in words."""


class TrainingError(RuntimeError):
    """The run cannot go on; what was trained is saved, or the message says what is not."""

    everywhere = True  # all processes of a run come to it


class CheckpointError(TrainingError):
    """A checkpoint could not be written, or none could be read."""


class Interrupted(Exception):
    """The run was asked to stop, and everything is saved."""

    everywhere = True

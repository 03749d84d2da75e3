"""The family of errors a user can cause.

Each text names the field or file, the value, the rule and the way out. The command line prints it without a traceback
and exits with code 2; anything else that escapes is a defect of the program and keeps its traceback.
"""


class MegaxelmError(Exception):
    """A mistake in the input or the surroundings that the user can mend."""


class RecipeError(MegaxelmError):
    """The recipe has an unknown key, a value out of range, or fields that contradict each other."""


class CorpusError(MegaxelmError):
    """A source of text is missing, empty, broken beyond the allowed share, or in an unknown language."""


class TokenizerError(MegaxelmError):
    """The tokenizer cannot be trained, loaded, or does not fit the model."""


class ClusterError(MegaxelmError):
    """The documents or languages cannot be divided as asked."""


class TokenIndexError(MegaxelmError):
    """A token index (.bin/.idx) is missing, truncated or inconsistent."""


class ModelError(MegaxelmError):
    """A model folder cannot be read, or asks for something the decoder does not have."""


class CheckpointError(MegaxelmError):
    """A training checkpoint is missing, unfinished or damaged."""


class TrainError(MegaxelmError):
    """Training cannot start or go on with these settings."""


class RoutingError(MegaxelmError):
    """A router or the ensemble was asked for something it cannot do."""


class MergeError(MegaxelmError):
    """The experts of a run cannot be made one model as asked."""


class ServeError(MegaxelmError):
    """The server cannot start with these settings."""


class StageError(MegaxelmError):
    """A stage of the run cannot be made, or an input of it is missing."""


class GrowError(MegaxelmError):
    """A language cannot be added to the run, or dropped from it, as asked."""


class Preempted(MegaxelmError):
    """Training was asked to stop, and has saved its state: not a mistake, but no result either. Exit code 75."""

"""Every error a user can cause or meet, with the exit code of the command that ends in it.

Each takes one string, so that it survives the pickling between a worker and the driver.
Each is also the standard-library error that a caller would expect to catch.
"""


class MantaError(Exception):
    """Base of all errors of this project: one message that says what is wrong and what would be right."""

    exit_code = 1


class ConfigError(MantaError, ValueError):
    """A run, search or serving file, or an override, is wrong; the message holds every mistake."""

    exit_code = 2


class DataError(MantaError, ValueError):
    """A data set or one of its records is wrong; the message names file and line."""

    exit_code = 3


class BaseModelError(MantaError, RuntimeError):
    """The base cannot be found, loaded or quantized."""

    exit_code = 4


class MethodError(MantaError, ValueError):
    """A method cannot be applied to this base, or its target matches nothing."""

    exit_code = 5


class DeltaError(MantaError, ValueError):
    """A delta directory is missing, corrupt or unsafe."""

    exit_code = 6


class WrongBaseError(DeltaError):
    """A delta was made for other source weights; the message names both hashes."""

    exit_code = 7


class RegistryError(MantaError, RuntimeError):
    """The tracking server or model registry cannot be reached or refuses."""

    exit_code = 8


class TrainError(MantaError, RuntimeError):
    """Training cannot go on."""

    exit_code = 9


class OutOfMemoryError(MantaError, MemoryError):
    """Too little memory; the message says what was needed and what would fit."""

    exit_code = 10


class ServeError(MantaError, RuntimeError):
    """The endpoint cannot be started, or a request cannot be answered."""

    exit_code = 11


class CheckpointError(MantaError, RuntimeError):
    """A checkpoint is missing, incomplete or of another schema."""

    exit_code = 12


class ClusterError(MantaError, RuntimeError):
    """Ray or the cluster does not offer what the run needs."""

    exit_code = 13


class NotBetterError(MantaError, ValueError):
    """A promotion is refused, since the metric does not improve; the message holds both figures."""

    exit_code = 14

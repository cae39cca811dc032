"""Every error fedbpt raises on purpose. Each message is one line that says what to do.

::

    FedbptError
    ├── InputError (ValueError)        a bad argument: shape, NaN, an empty text, a token id outside the vocabulary
    │   ├── TaskError                  a template or label word that cannot work with this model
    │   ├── DataError                  a data file: missing column, unknown label, empty row
    │   └── ConfigError                a run file or option
    ├── ModelError
    │   ├── ModelNotFoundError         no such name in the catalogue, no such file
    │   ├── ModelFileError             not a GGUF file, cut short, contradicting itself, a part missing
    │   ├── UnsupportedModelError      no causal decoder, an architecture that the soft prompt cannot serve
    │   └── DownloadError              no network, wrong checksum
    ├── PromptError                    a prompt file that is damaged or made for another model
    ├── WireError                      a message that is refused: unknown field, wrong shape, NaN, too large
    ├── DeviceError
    │   ├── DeviceUnreachableError     no answer: wrong address, powered off, timed out
    │   ├── DeviceTimeoutError         the device answers, but did not finish in time
    │   ├── DeviceRefusedError         the device understood and said no (4xx); ``code`` says why
    │   └── DeviceFailedError          the device's work ended in an error
    ├── CoordinatorRefusedError        the coordinator said no to a device that called; ``code`` says why
    ├── FederationError
    │   └── QuorumError                too few devices reported before the deadline
    ├── StoreError                     the run database cannot be read or written
    ├── ScoringInterrupted             a scoring call was cancelled
    ├── RunStopped                     somebody stopped a run that can be resumed
    └── MissingExtraError (ImportError) an optional dependency is not installed

``exit_code`` is what the command line exits with (2: the caller's mistake, 1: the world's).
"""

from __future__ import annotations

from fedbpt.plain_text import one_line

MOST_SAID = 4000
"""Longest message of an error, in characters: it may quote what others wrote."""


class FedbptError(Exception):
    """Base of every error raised on purpose. Its text is one line that any terminal may show.

    ``public``: the message without what it quotes of a row; all that another machine is told.
    ``field``: the name of the argument, setting, option, column, key or path that is wrong; empty where none is.
    ``limit``: the bound that was passed; None where there is none.
    """

    exit_code = 1

    def __init__(
        self, message: str = "", *, public: str | None = None, field: str = "", limit: float | None = None
    ) -> None:
        super().__init__(message)
        self.public = one_line(message if public is None else public, MOST_SAID)
        self.field = field
        self.limit = limit

    def __str__(self) -> str:
        return one_line(super().__str__(), MOST_SAID)


class ModelWarning(UserWarning):
    """A model that fedbpt computes otherwise than its makers do (`NativeScorer.notes`)."""


class InputError(FedbptError, ValueError):
    """A bad argument."""

    exit_code = 2


class TaskError(InputError):
    """A template or label word that cannot work with this model."""


class DataError(InputError):
    """A data file that cannot be used as it is."""


class ConfigError(InputError):
    """A run file or a command-line option that makes no sense."""


class ModelError(FedbptError):
    """Something about a model file."""


class ModelNotFoundError(ModelError):
    """No such model in the catalogue and no such file."""

    exit_code = 2


class ModelFileError(ModelError):
    """Not a GGUF file, or a damaged one, or one of several is missing."""


class UnsupportedModelError(ModelError):
    """No causal decoder, or an architecture that the soft prompt cannot serve."""


class DownloadError(ModelError):
    """A model could not be fetched, or is not what the catalogue says."""


class PromptError(FedbptError):
    """A prompt file that is damaged or was made for another model."""


class WireError(FedbptError):
    """A message that is refused."""


class DeviceError(FedbptError):
    """Something about one device. ``device``: its name, empty where it speaks of itself; ``reason``: what is wrong."""

    def __init__(self, reason: str = "", *, device: str = "", field: str = "", limit: float | None = None) -> None:
        super().__init__(f"{device}: {reason}" if device else reason, field=field, limit=limit)
        self.device, self.reason = device, one_line(reason, MOST_SAID)


class DeviceUnreachableError(DeviceError):
    """The device did not answer."""


class DeviceTimeoutError(DeviceError):
    """The device answers, but did not finish its work in time."""


class DeviceRefusedError(DeviceError):
    """The device understood the request and refused it. ``code`` is stable, for programs: ``unknown-round``, ..."""

    def __init__(self, reason: str, code: str = "refused", *, device: str = "") -> None:
        super().__init__(reason, device=device)
        self.code = code


class DeviceFailedError(DeviceError):
    """The device's work ended in an error. ``is_fault``: in one that fedbpt does not raise on purpose."""

    def __init__(self, reason: str, *, is_fault: bool = False, device: str = "") -> None:
        super().__init__(reason, device=device)
        self.is_fault = is_fault


class CoordinatorRefusedError(FedbptError):
    """The coordinator said no to a device that called. ``code`` is stable, for programs: ``unauthorized``, ...

    ``retry_after_s``: when to call again, seconds; 0: the same call will be refused again.
    """

    def __init__(self, message: str, code: str = "refused", retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.code = code
        self.retry_after_s = retry_after_s


class FederationError(FedbptError):
    """A run that cannot go on."""


class QuorumError(FederationError):
    """Too few devices reported before the deadline."""


class StoreError(FedbptError):
    """The run database cannot be read or written."""


class ScoringInterrupted(FedbptError):  # noqa: N818 - cancelled is no failure
    """A scoring call was cancelled before it ended."""

    exit_code = 130


class RunStopped(FedbptError):  # noqa: N818 - no failure either
    """Somebody stopped the run: what it had committed stays, and the same call resumes it."""

    exit_code = 130


class MissingExtraError(FedbptError, ImportError):
    """An optional dependency is not installed."""

    exit_code = 2

    def __init__(self, feature: str, extra: str) -> None:
        super().__init__(f"{feature} needs an optional dependency: pip install 'fedbpt[{extra}]'")

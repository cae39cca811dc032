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
    │   ├── DeviceUnreachableError     no response: wrong address, powered off, timed out
    │   ├── DeviceTimeoutError         the device responds, but did not finish in time
    │   ├── DeviceRefusedError         the device refused a valid request (4xx); ``code`` says why
    │   └── DeviceFailedError          the device's work ended in an error
    ├── CoordinatorRefusedError        the coordinator refused a device's request; ``code`` says why
    ├── FederationError
    │   └── QuorumError                too few devices reported before the deadline
    ├── StoreError                     the run database cannot be read or written
    ├── ScoringInterrupted             a scoring call was cancelled
    ├── RunStopped                     a run was stopped and can be resumed
    └── MissingExtraError (ImportError) an optional dependency is not installed

``exit_code`` is the exit status of the command line: 2 for a caller's mistake, 130 for an interruption, 1 for the rest.
"""

from __future__ import annotations

from fedbpt.plain_text import one_line

MAX_MESSAGE_CHARS = 4000
"""Length that a message is cut to, in characters: it may quote text from outside."""


class FedbptError(Exception):
    """Base of every error raised on purpose. Its text is one line without control characters, safe for a terminal.

    ``public``: the message without text quoted from a row; the only part sent to another machine.
    ``field``: name of the argument, setting, option, column, key or path that is wrong; empty if none is.
    ``limit``: the bound that was exceeded; None if there is none.
    """

    exit_code = 1

    def __init__(
        self, message: str = "", *, public: str | None = None, field: str = "", limit: float | None = None
    ) -> None:
        super().__init__(message)
        self.public = one_line(message if public is None else public, MAX_MESSAGE_CHARS)
        self.field = field
        self.limit = limit

    def __str__(self) -> str:
        return one_line(super().__str__(), MAX_MESSAGE_CHARS)


class ModelWarning(UserWarning):
    """A model that fedbpt computes differently from its reference implementation (`NativeScorer.notes`)."""


class InputError(FedbptError, ValueError):
    """A bad argument."""

    exit_code = 2


class TaskError(InputError):
    """A template or label word that cannot work with this model."""


class DataError(InputError):
    """A data file that cannot be used as it is."""


class ConfigError(InputError):
    """An invalid run file or command-line option."""


class ModelError(FedbptError):
    """Something about a model file."""


class ModelNotFoundError(ModelError):
    """Neither a model of the catalogue nor a file."""

    exit_code = 2


class ModelFileError(ModelError):
    """Not a GGUF file, a damaged one, or one part of a split model is missing."""


class UnsupportedModelError(ModelError):
    """No causal decoder, or an architecture that the soft prompt cannot serve."""


class DownloadError(ModelError):
    """A model could not be downloaded, or does not match the catalogue's checksum."""


class PromptError(FedbptError):
    """A prompt file that is damaged or was made for another model."""


class WireError(FedbptError):
    """An invalid message from another machine."""


class DeviceError(FedbptError):
    """A problem with one device. ``device``: its name, empty on the device itself; ``reason``: what is wrong."""

    def __init__(self, reason: str = "", *, device: str = "", field: str = "", limit: float | None = None) -> None:
        super().__init__(f"{device}: {reason}" if device else reason, field=field, limit=limit)
        self.device = device
        self.reason = one_line(reason, MAX_MESSAGE_CHARS)


class DeviceUnreachableError(DeviceError):
    """The device did not respond."""


class DeviceTimeoutError(DeviceError):
    """The device responds, but did not finish its work in time."""


class DeviceRefusedError(DeviceError):
    """The device refused a valid request. ``code`` is stable and meant for programs: ``unknown-round``, ..."""

    def __init__(self, reason: str, code: str = "refused", *, device: str = "") -> None:
        super().__init__(reason, device=device)
        self.code = code


class DeviceFailedError(DeviceError):
    """The device's work ended in an error. ``is_fault``: one that is not a `FedbptError`."""

    def __init__(self, reason: str, *, is_fault: bool = False, device: str = "") -> None:
        super().__init__(reason, device=device)
        self.is_fault = is_fault


class CoordinatorRefusedError(FedbptError):
    """The coordinator refused a device's request. ``code`` is stable and meant for programs: ``unauthorized``, ...

    ``retry_after_s``: seconds to wait before retrying; 0 if a retry would be refused too.
    """

    def __init__(self, message: str, code: str = "refused", retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.code = code
        self.retry_after_s = retry_after_s


class FederationError(FedbptError):
    """A run that cannot continue."""


class QuorumError(FederationError):
    """Too few devices reported before the deadline."""


class StoreError(FedbptError):
    """The run database cannot be read or written."""


class ScoringInterrupted(FedbptError):  # noqa: N818 - a cancellation is not a failure
    """A scoring call was cancelled before it finished."""

    exit_code = 130


class RunStopped(FedbptError):  # noqa: N818 - not a failure either
    """The run was stopped: committed rounds are kept, and the same call resumes it."""

    exit_code = 130


class MissingExtraError(FedbptError, ImportError):
    """An optional dependency is not installed."""

    exit_code = 2

    def __init__(self, feature: str, extra: str) -> None:
        super().__init__(f"{feature} needs an optional dependency: pip install 'fedbpt[{extra}]'")

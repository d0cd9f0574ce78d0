"""Errors that a person can cause and mend.

Each message is one line: what is wrong, where, and what to do. The command line prints it without
a traceback and exits with 2. Anything else that escapes is a bug of ours and stays loud.
"""


class MobileVLMError(Exception):
    """Base of every error caused by input, files or environment."""

    exit_code = 2
    """Exit code of the command line."""


class CheckpointError(MobileVLMError):
    """A checkpoint folder that cannot be read: a missing file or key, a wrong shape or value."""


class BundleError(MobileVLMError):
    """A bundle that cannot be used: damaged, incomplete, or written by a newer version."""


class ReplacedError(BundleError):
    """A bundle that was replaced while it was opened or in use: loading it again helps."""


class ImageError(MobileVLMError):
    """An image that cannot be opened, or a file that is no image."""


class AudioError(MobileVLMError):
    """A sound that cannot be read or that a model does not take."""


class MemoryLimitError(MobileVLMError):
    """A model that needs more memory than a limit allows; the message says how much."""


class PromptError(MobileVLMError):
    """A prompt that does not fit: empty, too long, or with the wrong number of ``<image>``."""


class GrammarError(MobileVLMError):
    """A JSON schema or grammar that no answer can follow, or that cannot be read."""


class SuiteError(MobileVLMError):
    """Files of a benchmark that cannot be read."""


class SessionError(MobileVLMError):
    """A session that cannot be used now: another thread or stream has it, or its model was loaded
    before this process was forked."""


class MissingExtraError(MobileVLMError):
    """A feature needs a package that is not installed; the message names the extra."""


class DeviceError(MobileVLMError):
    """A device that cannot be measured: out of reach, without what it needs, or the measurement
    failed there (then with its exit code)."""

    def __init__(self, message: str, exit_code: int = 2) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class QualityError(MobileVLMError):
    """An artifact is further from the reference than its recipe allows (exit code 1)."""

    exit_code = 1


class TargetError(QualityError):
    """An artifact would not run on its target (exit code 1)."""


class PrecisionWarning(UserWarning):
    """A bundle that runs here, but another export of it would be more exact."""


class FileWarning(UserWarning):
    """A file made elsewhere says something that is done otherwise here."""


class PlanWarning(UserWarning):
    """A plan or setting that cannot be used as it is: the bundle runs without it, or by less."""


class ImageWarning(UserWarning):
    """An image that is read, but not exactly as its file says."""


class CacheWarning(UserWarning):
    """Visual tokens in a cache folder that cannot be read or written: they are computed again."""


class AudioWarning(UserWarning):
    """A sound of which a part is not heard."""


def require(module: str, extra: str, purpose: str) -> MissingExtraError:
    """The error for a missing optional package, worded the same everywhere."""
    return MissingExtraError(
        f"{purpose} needs the package {module!r}: pip install 'mobilevlm-edge[{extra}]'"
    )

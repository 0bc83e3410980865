"""The one error tree of Preceptor and the exit code that each branch maps to.

Every message says what is wrong, which value was got, which values are allowed and what to do about it, in one line.
Each class is also the standard-library kind that it refines, so ``except ValueError`` keeps working.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class PreceptorError(Exception):
    """Root of every error that Preceptor raises on purpose.

    ``exit_code`` is what the command line returns when the error reaches it.
    """

    exit_code = 2


class ConfigError(PreceptorError, ValueError):
    """A configuration is not usable; ``faults`` lists every problem found, not only the first."""

    def __init__(self, *faults: str) -> None:
        super().__init__("; ".join(faults))
        self.faults = faults

    def __reduce__(self) -> tuple[type[ConfigError], tuple[str, ...]]:
        return type(self), self.faults


class DataError(PreceptorError, ValueError):
    """An article, corpus or recorded file cannot be used."""


class ModelError(PreceptorError, ValueError):
    """A language model or tokenizer is missing or unfit for what is asked of it."""


class ShapeError(PreceptorError, ValueError):
    """Tensors disagree about their shapes."""


class MissingExtraError(PreceptorError, ImportError):
    """An optional dependency is needed; the message carries the command that installs it."""

    def __init__(self, purpose: str, *, package: str, extra: str) -> None:
        super().__init__(f"{purpose} needs the package '{package}'; install it with: pip install 'preceptor[{extra}]'")
        self.arguments = (purpose, package, extra)

    def __reduce__(self) -> tuple[object, ...]:
        purpose, package, extra = self.arguments
        return _missing_extra, (purpose, package, extra)


def _missing_extra(purpose: str, package: str, extra: str) -> MissingExtraError:
    return MissingExtraError(purpose, package=package, extra=extra)


class NumericError(PreceptorError, ArithmeticError):
    """Non-finite numbers persisted past what a run tolerates."""

    exit_code = 3


class LockedError(PreceptorError, RuntimeError):
    """A run folder is in use by another process."""

    exit_code = 4


class StorageError(PreceptorError, OSError):
    """Something could not be written or read back: disk full, permissions, damage."""

    exit_code = 5


class CheckpointError(StorageError):
    """A checkpoint is damaged, missing or of another run."""


class ServiceError(PreceptorError, RuntimeError):
    """A remote service failed, refused the key, or its budget is spent."""

    exit_code = 6


class Interrupted(PreceptorError, KeyboardInterrupt):
    """A signal ended the run; ``exit_code`` is 128 plus the signal's number: 130 for Ctrl-C, 143 for SIGTERM."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.signal_number = signal_number
        self.exit_code = 128 + signal_number

    def __str__(self) -> str:
        return str(self.args[0])

    def __reduce__(self) -> tuple[type[Interrupted], tuple[str, int]]:
        return type(self), (str(self), self.signal_number)


class LostProcessError(PreceptorError, RuntimeError):
    """Another process of a run on many ended, so that this one cannot go on."""

    exit_code = 8


class ToldHere(PreceptorError, RuntimeError):
    """An error in one process of a run on many, which tells it in ``faults`` for all of them."""

    def __init__(self, faults: Iterable[str], exit_code: int) -> None:
        self.faults = tuple(faults)
        super().__init__("; ".join(self.faults))
        self.exit_code = exit_code

    def __reduce__(self) -> tuple[type[ToldHere], tuple[tuple[str, ...], int]]:
        return type(self), (self.faults, self.exit_code)


class ToldElsewhere(PreceptorError, RuntimeError):
    """This process ends because of an error that another process of the run tells; ``exit_code`` is that error's."""

    def __init__(self, exit_code: int) -> None:
        super().__init__("another process of this run tells what happened")
        self.exit_code = exit_code

    def __reduce__(self) -> tuple[type[ToldElsewhere], tuple[int]]:
        return type(self), (self.exit_code,)


def did_you_mean(word: str, candidates: Iterable[str]) -> str:
    """A hint ``" (did you mean 'x'?)"`` naming the candidate closest to ``word``, or ``""`` when none is close.

    >>> did_you_mean("lerning_rate", ["learning_rate", "seed"])
    " (did you mean 'learning_rate'?)"
    >>> did_you_mean("zzz", ["learning_rate"])
    ''
    """
    matches = get_close_matches(word, list(candidates), n=1)
    return f" (did you mean '{matches[0]}'?)" if matches else ""


def short_repr(value: object) -> str:
    """``value`` as messages quote it: its repr, cut to 60 characters, always printable and in one line."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."

"""Every error that mge raises on purpose, each an `MGEError`.

A message is one line: what, found, expected, what to do. The commands catch `MGEError` alone, print that line and exit
with 1; any other exception is a defect and shows its traceback.
"""

_JOINERS = "\u200c\u200d"  # zero width: Persian, Indic scripts and emoji are spelled with them


class MGEError(Exception):
    """Base of all errors that name something the user can act on."""


class InputError(MGEError):
    """An image, a folder or an array that cannot be used."""


class CheckpointError(MGEError):
    """A checkpoint that is missing, damaged, foreign or at odds with its labels."""


class BundleError(MGEError):
    """A bundle that is missing, damaged, foreign or newer than this runtime."""


class BackendError(MGEError):
    """No backend can run this bundle here, or one failed while it ran."""


class BuildError(MGEError):
    """An engine that cannot be built, or is not what was asked for."""


class ExportError(MGEError):
    """A model that cannot be exported, or whose export is out of tolerance."""


class TrainingError(MGEError):
    """A training that cannot start or go on."""


class OutputError(MGEError):
    """A place that cannot be written."""


def printable(text: str) -> str:
    """Replace what must not reach a terminal (control characters, undecodable bytes) by "?"."""
    return "".join(c if c.isprintable() or c in _JOINERS else " " if c.isspace() and c > "\x85" else "?" for c in text)


def one_line(error: Exception | str) -> str:
    """An error as one line that any terminal may be given: names in it come from files and from strangers."""
    return printable(" ".join(str(error).split()))


def brief(error: BaseException) -> str:
    """What a library's error says, in one line of at most 300 characters; its class where it says nothing."""
    return one_line(str(error))[:300] or type(error).__name__

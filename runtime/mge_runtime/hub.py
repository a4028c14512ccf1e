"""Bundles on the Hugging Face Hub, named `hf://owner/name[@revision][/file]`."""

from __future__ import annotations

import importlib
import logging
import math
import re
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from mge_runtime.errors import BundleError, brief
from mge_runtime.files import format_bytes
from mge_runtime.machine import import_library, install_extra

_SCHEME = "hf://"
_FOLDED = re.compile("^hf://?")
_NAME = r"\w[\w.-]*"
_ADDRESS = re.compile(rf"{_SCHEME}({_NAME}/{_NAME})(?:@({_NAME}))?(?:/((?:{_NAME}/)*{_NAME}\.plan))?", re.ASCII)
_REFUSALS = {  # by huggingface_hub's error; the first that fits
    "GatedRepoError": "its owner grants access: ask on its page, then log in (hf auth login)",
    "RepositoryNotFoundError": "no such repository, or a private one: check its name, or log in (hf auth login)",
    "RevisionNotFoundError": "the repository has no such revision: check what follows the @",
    "RemoteEntryNotFoundError": "the repository has no such file: name one that it has, hf://owner/name/other.plan",
}
_LOGGER = logging.getLogger("mge_runtime")
_LARGEST = 2**32 - 1  # bytes; no bundle is larger (`bundle.archive`)


@dataclass(frozen=True)
class HubAddress:
    """One bundle in a model repository."""

    repository: str  # "owner/name"
    revision: str = "main"  # a branch, a tag or a commit
    file: str = "mge.plan"  # its path in the repository

    @classmethod
    def parse(cls, text: str) -> HubAddress | None:
        """Read an address; None for what does not start with `hf://`, or `hf:/` as `pathlib` makes of it.

        Raises:
            BundleError: it is none of the Hub.
        """
        text, count = _FOLDED.subn(_SCHEME, text)
        if not count:
            return None
        if (found := _ADDRESS.fullmatch(text)) is None:
            raise BundleError(
                f"cannot open {text}: expected hf://owner/name, hf://owner/name@revision or hf://owner/name/file.plan"
            )
        repository, revision, file = found.groups()
        return cls(repository, revision or cls.revision, file or cls.file)

    def __str__(self) -> str:
        """For example "hf://owner/name@main/mge.plan"."""
        return f"{_SCHEME}{self.repository}@{self.revision}/{self.file}"

    def download(self) -> str:
        """Fetch this one file into huggingface_hub's cache, unless it is there; where it lies.

        The Hub is asked whether the revision has moved. Where it does not respond (no connection, a time-out, an error
        of its own: 5xx) what is cached serves, and a warning says so; what it refuses is an error. Endpoint, token,
        cache and time limits (10 s without a byte) are huggingface_hub's and those of its environment variables.

        Raises:
            BackendError: huggingface_hub is not installed.
            BundleError: the Hub gives no such file, it is too large, or the Hub does not respond and nothing is cached.
        """
        hub = import_library("huggingface_hub", install_extra("hf"))
        errors = importlib.import_module("huggingface_hub.errors")
        place = {"repo_id": self.repository, "filename": self.file, "revision": self.revision}
        try:
            size = hub.get_hf_file_metadata(hub.hf_hub_url(**place)).size
            return hub.hf_hub_download(**place, tqdm_class=self._bar(size))
        except BundleError:
            raise
        except Exception as error:  # whatever the libraries below huggingface_hub raise, in any of its releases
            for name, problem in _REFUSALS.items():
                if isinstance(error, getattr(errors, name)):
                    raise BundleError(f"cannot open {self}: {problem}") from error
            http_error = errors.HfHubHTTPError.__bases__[0]  # that of httpx, or of what a release has in its place
            status = getattr(getattr(error, "response", None), "status_code", 500)  # none: nothing came back
            if status < 500 or not isinstance(error, (http_error, ConnectionError)):
                raise BundleError(f"cannot open {self}: {brief(error)}") from error
            with suppress(errors.LocalEntryNotFoundError):
                path = hub.hf_hub_download(**place, local_files_only=True)
                _LOGGER.warning("%s is as it was cached: the Hub cannot be asked (%s)", self, brief(error))
                return path
            raise BundleError(
                f"cannot open {self}: the Hub cannot be asked ({brief(error)}) and nothing is cached; check the "
                "network, HF_ENDPOINT and HF_HUB_OFFLINE, or copy the file here"
            ) from error

    def _bar(self, size: int | None) -> type:
        """A progress bar that stops a download which is too large, or larger than was announced."""
        if size is not None and size > _LARGEST:
            raise BundleError(
                f"cannot open {self}: it has {format_bytes(size)}; expected at most {format_bytes(_LARGEST)}, as every "
                "bundle has: name its .plan file"
            )
        most, address = size or _LARGEST, self
        tqdm: Any = importlib.import_module("huggingface_hub.utils").tqdm

        class Bar(tqdm):
            def __init__(self, *args: Any, **options: Any) -> None:
                # Xet, which knows a file's size by its hash, has two bars: one counts what travels, which may be more.
                self._left = most if options.get("name") == "huggingface_hub.http_get" else math.inf
                tqdm.__init__(self, *args, **options)

            def update(self, n: float = 1) -> object:
                self._left -= n
                if self._left < 0:
                    raise BundleError(f"cannot open {address}: more came than the {most} bytes announced; try again")
                return tqdm.update(self, n)

        return Bar

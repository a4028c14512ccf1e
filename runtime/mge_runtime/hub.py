"""Bundles on the Hugging Face Hub, named `hf://owner/name[@revision][/file]`."""

from __future__ import annotations

import importlib
import re
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from mge_runtime.errors import BundleError, brief
from mge_runtime.files import format_bytes
from mge_runtime.machine import import_library, install_extra

__all__ = ["HubAddress"]

_SCHEME = "hf://"
_NAME = r"\w[\w.-]*"
_ADDRESS = re.compile(rf"{_SCHEME}({_NAME}/{_NAME})(?:@({_NAME}))?(?:/((?:{_NAME}/)*{_NAME}\.plan))?", re.ASCII)
_REFUSALS = {  # by huggingface_hub's error; the first that fits
    "GatedRepoError": "its owner grants access: ask on its page, then log in (hf auth login)",
    "RepositoryNotFoundError": "no such repository, or a private one: check its name, or log in (hf auth login)",
    "RevisionNotFoundError": "the repository has no such revision: check what follows the @",
    "RemoteEntryNotFoundError": "the repository has no such file: name one that it has, hf://owner/name/other.plan",
}
_LARGEST = 2**32 - 1  # bytes; no bundle is larger (`bundle.archive`)


@dataclass(frozen=True)
class HubAddress:
    """One bundle in a model repository."""

    repository: str  # "owner/name"
    revision: str = "main"  # a branch, a tag or a commit
    file: str = "mge.plan"  # its path in the repository

    @classmethod
    def parse(cls, text: str) -> HubAddress | None:
        """Read an address; None for what does not start with `hf://`.

        Raises:
            BundleError: it is none of the Hub.
        """
        if not text.startswith(_SCHEME):
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

        The Hub is asked once whether the revision has moved; where it cannot be asked, what is cached serves. Endpoint,
        token, cache and time limits (10 s without a byte) are huggingface_hub's and those of its environment variables.

        Raises:
            BackendError: huggingface_hub is not installed.
            BundleError: there is no such file, it is too large, or the Hub cannot be asked and nothing is cached.
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
            with suppress(errors.LocalEntryNotFoundError):
                return hub.hf_hub_download(**place, local_files_only=True)
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
        most, arrived = size or _LARGEST, 0
        tqdm: Any = importlib.import_module("huggingface_hub.utils").tqdm

        class Bar(tqdm):
            def update(self, n: float = 1) -> object:
                nonlocal arrived
                if (arrived := arrived + n) > most:
                    raise BundleError(f"cannot open {address}: more came than the {most} bytes announced; try again")
                return tqdm.update(self, n)

        address = self
        return Bar

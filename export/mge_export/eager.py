"""PyTorch's ways of computing a checkpoint, as contenders of the bench.

Timed is what is timed of the chain: frames in memory (uint8) -> answer on the host. Each frame becomes a normalised
tensor by itself, as in the authors' loader, the batch is moved to the device and computed under `torch.no_grad`, and
the logits are copied back. Decoding, loading and compiling are not in it.

On CUDA (experimental: not yet run) each way is there twice: in FP32 as the authors run it, with PyTorch's own settings
for TF32, and under FP16 autocast. Their `cudnn.benchmark = True` is set for both.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mge.checkpoint import load_checkpoint
from mge.config import MGEConfig
from mge.data.folder import normalize
from mge.model import MGENet
from mge_export.eager_chain import AuthorsChain
from mge_export.eager_trunk import EagerUnavailable
from mge_runtime.bench.contender import MILLISECONDS, Contender
from mge_runtime.errors import InputError, brief

__all__ = [
    "AUTHORS",
    "COMPILED",
    "MODEL",
    "AuthorsContender",
    "CompiledContender",
    "EagerUnavailable",
    "ModelContender",
    "eager_contenders",
    "to_images",
]

AUTHORS = "PyTorch eager, the authors' way"
COMPILED = "PyTorch, the authors' way with torch.compile"
MODEL = "PyTorch eager, MGENet"  # attention in closed form, crops without a loop
_AUTOCAST = " (FP16 autocast)"

# Every half trunk, with and without gradients, is a version of the same `Sequential.forward` to torch.compile.
_VERSIONS = 256


class _EagerContender:
    """One way of computing a batch in PyTorch.

    `logits` [B, C] float32 is the last answer, for whoever compares answers. `threads` is how many PyTorch says that it
    computed the last answer with; None before, and on a GPU.
    """

    title: str
    unit = MILLISECONDS

    def __init__(
        self, model: MGENet, frames: np.ndarray, threads: int | None, device: str, *, autocast: bool = False
    ) -> None:
        self.name = self.title + (_AUTOCAST if autocast else "")
        self.logits: np.ndarray | None = None
        self._frames = frames
        self._device = torch.device(device)
        self._threads = threads
        self.threads: int | None = None
        self._autocast = autocast
        self._config = model.config
        self._compute: Callable[[Tensor], Any] | None = self._make(model)

    def _make(self, model: MGENet) -> Callable[[Tensor], Any]:
        """What answers images [B, 3, S, S]; its result has `logits` [B, C]."""
        raise NotImplementedError

    def run(self) -> None:
        """Answer the batch once.

        Raises:
            EagerUnavailable: PyTorch failed, or the contender is closed.
        """
        try:
            self._answer()
        except RuntimeError as error:  # out of memory, an operator that the device lacks
            raise EagerUnavailable(f"{self.name} failed: {brief(error)}") from error

    @torch.no_grad()
    def _answer(self) -> None:
        if self._compute is None:
            raise EagerUnavailable(f"{self.name} is closed; make a new one")
        if self._threads is not None:
            # Per thread where PyTorch uses OpenMP, so it is set where the work is done.
            torch.set_num_threads(self._threads)
        if self._device.type == "cpu":
            self.threads = torch.get_num_threads()
        autocast = torch.autocast(self._device.type, torch.float16) if self._autocast else nullcontext()
        images = to_images(self._frames, self._config).to(self._device)
        with autocast:
            logits = self._compute(images).logits
        self.logits = logits.float().cpu().numpy()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def close(self) -> None:
        """Let go of the model; its memory returns with the last contender that shares it."""
        self._compute = None


class AuthorsContender(_EagerContender):
    """Eager PyTorch with autograd Grad-CAM and a Python crop loop, see `mge_export.eager_chain`.

    Args:
        model: in evaluation mode, on the device. Its weights are shared, their gradients are written.
        frames: uint8 [B, S, S, 3].
        threads: of PyTorch on the CPU, for the whole process; None: as it is set (`OMP_NUM_THREADS`).
        device: "cpu" or "cuda:N", where the model is.
        autocast: compute in FP16 where PyTorch's autocast does.

    Raises:
        EagerUnavailable: a trunk cannot be cut at c4.
    """

    title = AUTHORS

    def _make(self, model: MGENet) -> Callable[[Tensor], Any]:
        return AuthorsChain(model)


class CompiledContender(_EagerContender):
    """The same with `torch.compile` around every network: the halves of the trunks, the heads, the gate.

    The loop over the crops stays Python. The graph is not retained after `backward`, which a compiled backward that
    reuses its buffers refuses and nothing needs. The constructor compiles, which takes minutes for large trunks.

    Args:
        model: as for `AuthorsContender`.
        frames: as for `AuthorsContender`.
        threads: as for `AuthorsContender`.
        device: as for `AuthorsContender`.
        autocast: as for `AuthorsContender`.

    Raises:
        EagerUnavailable: a trunk cannot be cut at c4, or torch.compile does not work here (on a CPU it needs a C++
            compiler).
    """

    title = COMPILED

    def __init__(
        self, model: MGENet, frames: np.ndarray, threads: int | None, device: str, *, autocast: bool = False
    ) -> None:
        try:
            super().__init__(model, frames, threads, device, autocast=autocast)
            with warnings.catch_warnings(), torch._dynamo.config.patch(recompile_limit=_VERSIONS):
                warnings.simplefilter("ignore")
                self._answer()
        except EagerUnavailable:
            raise
        except Exception as error:  # the compilers' exceptions have no common base
            raise EagerUnavailable(f"torch.compile does not work here: {brief(error)}") from error

    def _make(self, model: MGENet) -> Callable[[Tensor], Any]:
        # With fullgraph a network that cannot be compiled is an error, not silently eager.
        return AuthorsChain(
            model, lambda module: torch.compile(module, fullgraph=True, dynamic=False), retain_graph=False
        )


class ModelContender(_EagerContender):
    """Our own `MGENet` as it is: attention in closed form, crops as one batched computation.

    Args:
        model: as for `AuthorsContender`.
        frames: as for `AuthorsContender`.
        threads: as for `AuthorsContender`.
        device: as for `AuthorsContender`.
        autocast: as for `AuthorsContender`.
    """

    title = MODEL

    def _make(self, model: MGENet) -> Callable[[Tensor], Any]:
        return model


def to_images(frames: np.ndarray, config: MGEConfig) -> Tensor:
    """Frames uint8 [B, S, S, 3] to normalised images [B, 3, S, S] on the CPU, one by one as a loader does."""
    return torch.stack([normalize(frame, config) for frame in frames])


def eager_contenders(
    ckpt: Path, frames: np.ndarray, threads: int | None, device: str
) -> Iterator[Contender | EagerUnavailable]:
    """All of PyTorch's ways, opened one after the other on one copy of the weights; compiling comes last.

    Args:
        ckpt: a checkpoint, ours or the authors'.
        frames: uint8 [B, S, S, 3], the batch.
        threads: of PyTorch on the CPU, for the whole process; None: as it is set (`OMP_NUM_THREADS`).
        device: "cpu" or "cuda:N".

    Returns:
        The contenders, and in the place of each that does not work here the reason, with its `name`.

    Raises:
        CheckpointError: the checkpoint cannot be read.
        InputError: the frames do not fit it.
    """
    model = load_checkpoint(ckpt)
    size = model.config.image_size
    if frames.dtype != np.uint8 or frames.ndim != 4 or not len(frames) or frames.shape[1:] != (size, size, 3):
        raise InputError(
            f"frames are {frames.dtype} {list(frames.shape)}; {ckpt} takes uint8 [B, {size}, {size}, 3], B at least 1"
        )
    return _open(model, frames, threads, device)


def _open(
    model: MGENet, frames: np.ndarray, threads: int | None, device: str
) -> Iterator[Contender | EagerUnavailable]:
    cuda = torch.device(device).type == "cuda"
    reason = None
    if cuda:
        try:
            model.to(device)
            torch.backends.cudnn.benchmark = True
        except (RuntimeError, AssertionError) as error:
            reason = f"PyTorch cannot use {device}: {brief(error)}"
    for kind in (AuthorsContender, ModelContender, CompiledContender):
        for autocast in (False, True) if cuda else (False,):
            try:
                if reason is not None:
                    raise EagerUnavailable(reason)
                yield kind(model, frames, threads, device, autocast=autocast)
            except EagerUnavailable as error:
                error.name = kind.title + (_AUTOCAST if autocast else "")
                yield error

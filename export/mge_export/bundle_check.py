"""Compare a finished bundle with the graphs that were verified, opened and run as a device will do it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from mge_export.images import VerifyImages
from mge_export.runners import Tensors
from mge_runtime.errors import BackendError, BundleError, ExportError
from mge_runtime.pipeline import Pipeline

__all__ = ["check_bundle"]

# Of the largest magnitude in a tensor. The same graphs and weights run in the same library: equal, or nearly.
RELATIVE = 1e-5


def check_bundle(path: Path, images: VerifyImages, verified: Tensors) -> None:
    """Open a bundle with the runtime and compare everything that a prediction reports, on the first few images.

    Args:
        path: the bundle.
        images: that the graphs were verified on.
        verified: what their chain made of the first of `images.batches()`.

    Raises:
        ExportError: it cannot be opened or run, or answers otherwise.
    """
    threads = torch.get_num_threads()
    try:
        with Pipeline.open(path, device="cpu", backend="onnxruntime", threads=threads) as pipeline:
            for name, found in pipeline.run(next(images.batches())).items():
                _compare(name, found, verified[name])
    except (BundleError, BackendError) as error:
        # Not by the name of a file that is about to be removed.
        reason = str(error).replace(str(path.resolve()), "it").replace(str(path), "it")
        raise ExportError(f"the finished bundle cannot be run: {reason}; no bundle was written") from error


def _compare(name: str, found: np.ndarray, wanted: np.ndarray) -> None:
    difference = np.abs(found.astype(np.float64) - wanted).max()
    limit = RELATIVE * np.abs(wanted).max()
    if not difference <= limit:
        raise ExportError(
            f"the finished bundle answers otherwise than its graphs did: {name} differs by {difference:.1e}; "
            f"expected at most {limit:.1e}; no bundle was written"
        )

"""The chain as OpenVINO's own files, for Intel's processors; from a bundle, without PyTorch."""

from __future__ import annotations

import shutil
import sys
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from mge_runtime.bundle import Bundle
from mge_runtime.bundle.archive import CHAIN
from mge_runtime.bundle.reader import LABELS
from mge_runtime.errors import ExportError, brief
from mge_runtime.files import atomic_path, temporary_folder
from mge_runtime.machine import import_library, install_extra


def load_openvino() -> Any:
    """Import OpenVINO without its telemetry.

    Its import sends an event to Google Analytics and writes below HOME, without asking. Where the package
    `openvino_telemetry` is absent, a stub of OpenVINO's own takes its place.

    Raises:
        BackendError: it is missing or broken.
    """
    absent: Any = None
    if "openvino" not in sys.modules:  # else it is the program's own, as the program set it up
        sys.modules.setdefault("openvino_telemetry", absent)
    return import_library("openvino", install_extra("openvino"))


def write_openvino(bundle: Bundle, folder: Path) -> list[Path]:
    """Write a bundle's `chain.onnx` as `chain.xml` and `chain.bin`, with `labels.txt` beside them.

    Inputs, outputs and the types of weights are those of `chain.onnx`; its metadata is in `rt_info`, below "framework".

    Args:
        bundle: open.
        folder: where to; files of the same names are replaced when all are written.

    Returns:
        The files that were written.

    Raises:
        BackendError: OpenVINO is missing or broken.
        BundleError: an entry was damaged.
        ExportError: OpenVINO cannot convert the chain.
        OutputError: the folder cannot be written.
    """
    openvino = load_openvino()
    with suppress(OSError):  # atomic_path says what is wrong with the folder
        folder.mkdir(parents=True, exist_ok=True)
    with temporary_folder("openvino") as scratch:
        bundle.extract(scratch, bundle.chain_entries())
        chain = scratch / CHAIN
        try:
            model = openvino.Core().read_model(chain)
            openvino.save_model(model, chain.with_suffix(".xml"), compress_to_fp16=False)
        except RuntimeError as error:
            raise ExportError(f"OpenVINO {openvino.__version__} cannot convert the chain: {brief(error)}") from error
        written = [folder / name for name in ("chain.bin", "chain.xml", LABELS)]
        with ExitStack() as stack:
            for path in written:
                shutil.copyfile(chain.with_name(path.name), stack.enter_context(atomic_path(path)))
    return written

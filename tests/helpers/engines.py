"""Engines of TensorRT-RTX, built ahead of time by the vendor's own parser and builder: no GPU needed."""

from mge_runtime.bundle import Bundle
from mge_runtime.files import temporary_folder
from mge_runtime.trt.build import Job, ahead_of_time, build_engines
from mge_runtime.trt.builder import BuildOptions
from mge_runtime.trt.target import BatchRange
from mge_runtime.trt.vendor import load_vendor


def build_all(path, *capabilities, batch="1"):
    """Build a bundle's engines ahead of time; return the sizes of the plans and what was recorded."""
    vendor = load_vendor("tensorrt-rtx")
    with Bundle.open(path) as bundle, temporary_folder("test") as folder:
        (target,) = ahead_of_time(vendor, capabilities)
        new = build_engines(bundle, Job(vendor, target, None, BuildOptions(BatchRange.parse(batch))), folder)
        return {graph: plan.stat().st_size for graph, plan in new.plans.items()}, new.details.precision

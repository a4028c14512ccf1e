"""Which names of TensorRT's API the runtime uses, from its source and the stubs of 10.13.

A name counts as TensorRT's where the runtime's TensorRT modules access it as an attribute, or define it in a class that
TensorRT calls back, and one of the classes below has it. Some belong to Python too (`name`, `shape`): they are only
asked of classes that have them in the stubs, so nothing is asked in vain.
"""

import ast
import importlib.util
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
BUILDING = (
    *("Builder", "IBuilderConfig", "INetworkDefinition", "OnnxParser", "ParserError", "ILayer", "ITensor"),
    *("IOptimizationProfile", "ITimingCache", "IProgressMonitor", "BuilderFlag", "MemoryPoolType", "LayerType"),
    *("NetworkDefinitionCreationFlag", "ProfilingVerbosity"),
)
RUNNING = (
    *("Runtime", "ICudaEngine", "IExecutionContext", "ILogger", "IRuntimeConfig"),
    *("DataType", "ExecutionContextAllocationStrategy", "TensorIOMode", "LayerInformationFormat", "IHostMemory"),
)
# The runtime's own, of the same name: `Manifest.precision`, `Counter.update`.
OURS = {("ILayer", "precision"), ("ITimingCache", "update")}
# Used where they are there: 10.3 has no runtime configuration, TensorRT-RTX needs it.
GUARDED = {
    ("ICudaEngine", "create_runtime_config"),
    ("IRuntimeConfig", "set_execution_context_allocation_strategy"),
}
SOURCES = (
    *(ROOT / "runtime/mge_runtime/trt").glob("*.py"),
    ROOT / "runtime/mge_runtime/backends/tensorrt.py",
)


def used_names():
    """Every attribute that the TensorRT modules read, and every method they define in a class."""
    names = set()
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute):
                names.add(node.attr)
            elif isinstance(node, ast.ClassDef):
                names.update(part.name for part in node.body if isinstance(part, ast.FunctionDef))
    return {name for name in names if not name.startswith("_")}


def stub_classes():
    """Class -> its public names, in TensorRT 10.13."""
    spec = importlib.util.find_spec("tensorrt_bindings")
    (folder,) = spec.submodule_search_locations
    text = (Path(folder) / "tensorrt.pyi").read_text()  # no Python that `ast` would take: defaults before the rest
    classes = {}
    for block in re.split(r"^class ", text, flags=re.MULTILINE)[1:]:
        kind = re.match(r"\w+", block)[0]
        members = re.findall(r"^    (?:def ([a-zA-Z]\w*)|([a-zA-Z]\w*): )", block, flags=re.MULTILINE)
        classes[kind] = {name for pair in members for name in pair if name}
    return classes


def used_calls(classes):
    """(class, name) pairs that the runtime uses of these classes."""
    names, stubs = used_names(), stub_classes()
    return sorted({(kind, name) for kind in classes for name in stubs.get(kind, ()) if name in names} - OURS)


def missing_from(library):
    """Names that a compiled binding does not hold; for versions whose libraries are not at hand.

    pybind11 keeps the names it publishes as C strings. One may be the end of another (the linker merges them), so this
    finds names that are surely missing.
    """
    data = library.read_bytes()
    calls = [call for call in used_calls(BUILDING + RUNNING) if call not in GUARDED]
    return [f"{kind}.{name}" for kind, name in calls if name.encode() + b"\0" not in data]


if __name__ == "__main__":
    failed = False
    for argument in sys.argv[1:]:
        missing = missing_from(Path(argument))
        failed |= bool(missing)
        print(f"{argument}: {len(used_calls(BUILDING + RUNNING))} names, missing: {', '.join(missing) or 'none'}")
    sys.exit(failed)

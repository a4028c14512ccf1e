"""What may be added to a published bundle: a calibration, and engines for targets; each names the manifest's hash."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from mge_runtime.bundle.archive import CALIBRATION, engine_description
from mge_runtime.errors import BundleError
from mge_runtime.fields import Field, JsonValue, dump_json, parse_json
from mge_runtime.manifest import Entry, read_entry


@dataclass(frozen=True)
class EngineDescription:
    """`engines/<target>/engine.json`: the engines of one target."""

    manifest_sha256: str  # of the manifest whose ONNX they were built from
    target: str  # what they are for, such as "tensorrt-10.3-sm87-linux-aarch64"
    plans: Mapping[str, Entry]  # hash and size of each graph's engine, by its name
    details: Mapping[str, JsonValue]  # free: builder, options, attestation, ...

    def to_json(self) -> bytes:
        """The bytes of the entry."""
        return dump_json(asdict(self))

    @classmethod
    def from_json(cls, data: bytes, *, target: str, manifest_sha256: str) -> EngineDescription:
        """Read what `to_json` wrote; a BundleError: it is damaged, for another target or of another manifest."""
        document = engine_description(target)
        fields = parse_json(data, document).members(cls.__dataclass_fields__)
        if fields["target"].text() != target:
            fields["target"].fail(f'"{target}", the folder it lies in')
        _check_hash(fields["manifest_sha256"], document, manifest_sha256, "build the engines again with mge-build")
        plans = {graph: read_entry(field) for graph, field in fields["plans"].table().items()}
        return cls(manifest_sha256, target, plans, fields["details"].free())


@dataclass(frozen=True)
class Calibration:
    """`calibration.json`: what was learned after the export."""

    manifest_sha256: str  # of the manifest it was measured with
    values: Mapping[str, JsonValue]  # temperatures, exit thresholds, ...

    def to_json(self) -> bytes:
        """The bytes of the entry."""
        return dump_json(asdict(self))

    @classmethod
    def from_json(cls, data: bytes, *, manifest_sha256: str) -> Calibration:
        """Read what `to_json` wrote; a BundleError: it is damaged, or was measured with another manifest."""
        fields = parse_json(data, CALIBRATION).members(cls.__dataclass_fields__)
        _check_hash(fields["manifest_sha256"], CALIBRATION, manifest_sha256, "calibrate again with mge-calibrate")
        return cls(manifest_sha256, fields["values"].free())


def _check_hash(field: Field, document: str, expected: str, advice: str) -> None:
    found = field.hexadecimal()
    if found != expected:
        raise BundleError(
            f"{document} belongs to the manifest {found[:12]}; expected this bundle's, {expected[:12]}: {advice}"
        )

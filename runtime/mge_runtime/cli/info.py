"""`mge-info`: what is inside a bundle, and what would run here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mge_runtime.cli.common import reports_errors

if TYPE_CHECKING:
    from mge_runtime.bundle import Bundle


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("bundle", default="mge.plan")
@click.option("--json", "as_json", is_flag=True, help="Print everything, the whole manifest included, as JSON.")
@click.option("--verify", is_flag=True, help="Check every entry against its hash.")
@click.option(
    "--extract",
    metavar="DIR",
    help="Write every entry to this folder: plain ONNX files with their weights, engines, manifest.",
)
@click.version_option(package_name="mge")
@reports_errors
def main(bundle: str, as_json: bool, verify: bool, extract: str | None) -> None:
    """Show what is inside BUNDLE (default: mge.plan) and what would run here and why."""
    from mge_runtime.bundle import Bundle

    with Bundle.open(bundle) as opened:
        facts = describe(opened)
        if verify:
            opened.verify()
            facts["verified"] = True
        written = opened.extract(extract) if extract is not None else []
        if as_json:
            if extract is not None:
                facts["extracted"] = [str(path) for path in written]
            click.echo(json.dumps(facts, indent=1, ensure_ascii=False))
            return
        from mge_runtime.cli.info_text import info_lines

        for line in info_lines(facts):
            click.echo(line)
        if extract is not None:
            click.echo(f"extracted  {len(written)} files to {Path(extract)}")


def describe(bundle: Bundle) -> dict[str, Any]:
    """Everything that `mge-info` shows, as plain values.

    Raises:
        BundleError: a calibration or an engine's description is damaged or belongs to another manifest.
    """
    from mge_runtime.backends import choose
    from mge_runtime.errors import BackendError

    calibration = bundle.calibration()
    here: dict[str, Any]
    try:
        choice = choose()
        here = {
            "backend": choice.backend,
            "device": choice.device,
            "reason": choice.reason,
            "passed_over": [{"backend": c.backend, "device": c.device, "reason": c.reason} for c in choice.passed_over],
        }
    except BackendError as error:
        here = {"backend": None, "error": str(error)}
    engines: dict[str, Any] = {}
    for target in bundle.targets:
        engine = bundle.engine(target)
        sizes = {stage: plan.size for stage, plan in engine.plans.items()}
        engines[target] = {"plans": sizes, "details": dict(engine.details), "status": "experimental: not yet run"}
    return {
        "path": str(bundle.path),
        "size": bundle.path.stat().st_size,
        "manifest_sha256": bundle.manifest_sha256,
        "manifest": json.loads(bundle.manifest.to_json()),
        "entries": dict(bundle.sizes),
        "engines": engines,
        "calibration": None if calibration is None else dict(calibration.values),
        "here": here,
    }

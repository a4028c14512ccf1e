"""`mge-info`: what is inside a bundle, and what would run here."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from mge_runtime.cli.common import GPU_STATUS, reports_errors
from mge_runtime.errors import BackendError, BundleError, InputError, OutputError, printable
from mge_runtime.files import echo
from mge_runtime.interrupt import interruptible
from mge_runtime.machine import Machine, describe_machine

if TYPE_CHECKING:
    from mge_runtime.bundle import Bundle


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("bundle", default="mge.plan")
@click.option("--all", "everything", is_flag=True, help="Also print graphs, the parity report, the machine.")
@click.option("--json", "as_json", is_flag=True, help="Print everything, the whole manifest included, as JSON.")
@click.option("--card", "show_card", is_flag=True, help="Print its model card, Markdown, instead.")
@click.option(
    "--verify",
    metavar="[SHA256]",
    is_flag=False,
    flag_value="",
    help="Check every entry against its hash, and all of them against this one, which mge-info printed elsewhere.",
)
@click.option(
    "--extract",
    metavar="DIR",
    help="Write plain files to this folder: ONNX with weights (chain.onnx is the whole chain), class names, engines, "
    "manifest.",
)
@click.option(
    "--machine",
    "show_machine",
    is_flag=True,
    help="Print this machine's description as JSON instead: platform, GPUs, driver, libraries.",
)
@click.option(
    "--as-machine",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Say what would run on the machine that --machine described in this file.",
)
@click.version_option(package_name="mge")
@reports_errors
def main(
    bundle: str,
    everything: bool,
    as_json: bool,
    show_card: bool,
    verify: str | None,
    extract: str | None,
    show_machine: bool,
    as_machine: Path | None,
) -> None:
    """Show what is inside BUNDLE (default: mge.plan; hf://owner/name) and what would run here and why."""
    if show_machine:
        echo(describe_machine(always=True).to_json().decode(), nl=False)
        return
    if verify and not re.fullmatch("[0-9A-Fa-f]{64}", verify):
        if click.get_current_context().get_parameter_source("bundle") is not ParameterSource.DEFAULT:
            raise click.BadParameter(f"{verify!r} is no SHA-256; expected 64 hexadecimal digits", param_hint="--verify")
        bundle, verify = verify, ""  # mge-info --verify mge.plan
    from mge_runtime.bundle import Bundle

    machine = describe_machine() if as_machine is None else _recorded(as_machine)
    with Bundle.open(bundle) as opened:
        facts = describe(opened, machine, recorded=as_machine is not None)
        if verify is not None:
            opened.verify(expected=verify or None)
            facts["verified"] = True
        if extract is not None:
            with interruptible("the extraction", f"{extract} may lack files; each is whole, run it again", OutputError):
                facts["extracted"] = [str(path) for path in opened.extract(extract)]
        if show_card:
            if (card := facts["card"]) is None:
                raise BundleError(f"{bundle} has no model card; mge-export --card writes one")
            for line in card.splitlines():
                echo(printable(line.expandtabs()))
            return
        if as_json:
            echo(json.dumps(facts, indent=1))  # in ASCII: every locale can print it
            return
        from mge_runtime.cli.info_text import info_lines

        for line in info_lines(facts, opened.manifest, machine, everything=everything):
            echo(line)
        if extract is not None:
            echo(f"extracted  {len(facts['extracted'])} files to {printable(extract)}")


def _recorded(path: Path) -> Machine:
    expected = f"expected a machine's description: mge-info --machine > {path.name}"
    if path.exists() and not path.is_file():  # a pipe would be waited for, a device may never end
        raise InputError(f"cannot read {path}: it is no regular file; {expected}")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}; {expected}") from error
    return Machine.from_json(data, str(path))


def describe(bundle: Bundle, machine: Machine, *, recorded: bool = False) -> dict[str, Any]:
    """Everything that `mge-info` shows, as plain values.

    Args:
        bundle: open.
        machine: where it is to run.
        recorded: whether that is another machine than this one, whose cache nobody can look into.

    Raises:
        BundleError: a calibration or an engine's description is damaged or belongs to another manifest.
    """
    from mge_runtime.trt.engines import find_engines

    calibration = bundle.calibration()
    gpu = machine.gpus[0] if machine.gpus else None
    engines: dict[str, Any] = {}
    cached: list[dict[str, Any]] = []
    for found in find_engines(bundle, machine, gpu, cache=not recorded):
        # The bundle's are read again: a description that was damaged is an error here.
        description = bundle.engine(found.target) if found.engines is None else found.engines.description
        facts = {
            "plans": {graph: plan.size for graph, plan in description.plans.items()},
            "details": dict(description.details),
            "status": GPU_STATUS[found.backend],
            "misfit": found.problem,
        }
        if found.in_bundle:
            engines[found.target] = facts
        else:
            cached.append({"target": found.target, "place": found.place, **facts})
    return {
        "path": str(bundle.path),
        "size": bundle.path.stat().st_size,
        "sha256": bundle.sha256,
        "manifest_sha256": bundle.manifest_sha256,
        "manifest": json.loads(bundle.manifest.to_json()),
        "entries": dict(bundle.sizes),
        "engines": engines,
        "cached_engines": cached,
        "calibration": None if calibration is None else dict(calibration.values),
        "card": bundle.card(),
        "machine": json.loads(machine.to_json()),
        "here": {"recorded": recorded, **_what_runs(bundle, machine, cache=not recorded)},
    }


def _what_runs(bundle: Bundle, machine: Machine, *, cache: bool) -> dict[str, Any]:
    from mge_runtime.backends import choose

    try:
        choice = choose(bundle=bundle, machine=machine, cache=cache)
    except BackendError as error:
        return {"backend": None, "error": str(error)}
    return {
        "backend": choice.backend,
        "device": choice.device,
        "reason": choice.reason,
        "status": None if choice.device == "cpu" else GPU_STATUS[choice.backend],
        "passed_over": [{"backend": c.backend, "device": c.device, "reason": c.reason} for c in choice.passed_over],
    }

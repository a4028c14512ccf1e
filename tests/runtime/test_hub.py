"""Bundles named hf://owner/name come from the Hub, which here is a folder served on loopback."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from mge_calibration.cli import main as calibrate
from mge_export.cli import main as export
from mge_runtime import Bundle, BundleError, Pipeline
from mge_runtime.bundle import add_calibration
from mge_runtime.cli.bench import main as bench
from mge_runtime.cli.info import main as info
from mge_runtime.cli.run import main as run
from mge_runtime.hub import HubAddress
from tests.helpers.commands import fails, run_without, succeeds
from tests.helpers.hub import COMMIT, serve_hub

huggingface_hub = pytest.importorskip("huggingface_hub")


def ask(endpoint, monkeypatch):
    """What HF_ENDPOINT would have done before the import."""
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.fixture
def served(copy, monkeypatch, tmp_path):
    """The Hub, with the tiny bundle as `owner/name`, and a cache of its own."""
    with serve_hub(copy.parent) as server:
        ask(server.endpoint, monkeypatch)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        yield server


def test_a_bundle_of_the_hub_predicts_as_the_file_does(served, copy, photos):
    with Pipeline.open("hf://owner/name") as there, Pipeline.open(copy) as here:
        assert (there.predict(photos[0]).logits == here.predict(photos[0]).logits).all()
    assert {path for _, path in served.asked if "/api/" not in path} == {"/owner/name/resolve/main/mge.plan"}
    asked = len(served.asked)
    for address in ("hf://owner/name", f"hf://owner/name@{COMMIT}", "hf://owner/name@main/mge.plan"):
        with Bundle.open(address):
            pass
    assert {method for method, _ in served.asked[asked:]} == {"HEAD"}, "it was downloaded again"


@pytest.mark.usefixtures("served")
def test_a_file_in_a_folder_and_the_commands(copy, tmp_path):
    (copy.parent / "small").mkdir()
    copy.rename(copy.parent / "small/birds.plan")
    photograph = tmp_path / "bird.ppm"
    photograph.write_bytes(b"P6 40 40 255\n" + bytes(range(256)) * 18 + bytes(192))
    address = "hf://owner/name/small/birds.plan"
    assert "bird " in succeeds(run, "--engine", address, photograph).stdout
    assert "birds.plan" not in succeeds(info, address).stdout  # it lies in the cache, by its hash
    assert "onnxruntime on cpu" in succeeds(bench, "--engine", address, "--seconds", 1, photograph).output


def test_the_environment_names_the_endpoint_and_nothing_is_imported_before(served, tmp_path):
    code = (
        "import sys\nfrom mge_runtime import Bundle, Pipeline\nassert 'huggingface_hub' not in sys.modules\n"
        "print(Bundle.open('hf://owner/name').manifest.model)"
    )
    environment = os.environ | {"HF_ENDPOINT": served.endpoint, "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout == "{'arch': 'tiny'}\n", done.stderr


@pytest.mark.usefixtures("served")
@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("hf://owner", "expected hf://owner/name"),
        ("hf://owner/name/../../etc/x.plan", "expected hf://owner/name"),
        ("hf://owner/name/README.md", "expected hf://owner/name"),
        ("hf://owner/name/other.plan", "no such file: name one that it has"),
        ("hf://owner/name@v2", "no such revision: check what follows the @"),
        ("hf://owner/none", "no such repository, or a private one"),
        ("hf://owner/gated", "its owner grants access"),
        ("hf://owner/broken", "the Hub cannot be asked"),
    ],
)
def test_what_is_not_there_is_one_line(address, words, tmp_path):
    line = fails(run, "--engine", address, tmp_path / "mge.plan")
    assert words in line
    assert not list(tmp_path.rglob("blobs/*"))


@pytest.mark.parametrize("fault", [None, (500, ""), (503, "")])
def test_where_the_hub_does_not_respond_the_cached_file_serves_with_one_line(served, monkeypatch, caplog, fault):
    with Bundle.open("hf://owner/name") as bundle:
        known = bundle.sha256
    assert not caplog.messages
    served.fault = fault
    if fault is None:
        ask("http://127.0.0.1:9", monkeypatch)
    with Bundle.open("hf://owner/name") as bundle:
        assert bundle.sha256 == known
    (line,) = [record.getMessage() for record in caplog.records if record.name == "mge_runtime"]
    assert line.startswith("hf://owner/name@main/mge.plan is as it was cached: the Hub cannot be asked (")
    with pytest.raises(BundleError, match=r"the Hub cannot be asked .* and nothing is cached; check the network"):
        Bundle.open("hf://owner/other")


@pytest.mark.parametrize(
    "fault",
    [(401, ""), (403, ""), (403, "GatedRepo"), (404, "RepoNotFound"), (404, "EntryNotFound"), (404, ""), (429, "")],
)
def test_what_the_hub_refuses_is_one_line_whatever_is_cached(served, tmp_path, fault):
    Bundle.open("hf://owner/name").close()
    served.fault = fault
    line = fails(run, "--engine", "hf://owner/name", tmp_path / "a.png")
    assert "cannot open hf://owner/name@main/mge.plan: " in line


@pytest.mark.usefixtures("served")
def test_a_path_of_it_is_read_and_nothing_is_written_into_the_cache(copy, photos, tmp_path):
    with Bundle.open(Path("hf://owner/name")) as there, Bundle.open(copy) as here:
        assert there.sha256 == here.sha256
    for number, photo in enumerate(photos * 3):
        (tmp_path / f"data/bird {number % 5}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(photo).save(tmp_path / f"data/bird {number % 5}/{number}.png")
    (tmp_path / "words.md").write_text("---\nlicense: mit\n---\n## Data\n## Limits\n")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    for command, *arguments in (
        (calibrate, "hf://owner/name", "--data", tmp_path / "data"),
        (export, "--engine", "hf://owner/name", "--card", tmp_path / "words.md"),
    ):
        assert "download it (hf download owner/name mge.plan --revision main" in fails(command, *arguments)
    with pytest.raises(BundleError, match="can only be read"):
        add_calibration("hf://owner/name", {})
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}.items() >= before.items()


def test_a_file_larger_than_any_bundle_is_not_asked_for(served):
    served.size = 5 * 2**30
    with pytest.raises(BundleError, match=r"it has 5\.37 GB; expected at most 4\.29 GB"):
        Bundle.open("hf://owner/name")
    assert [method for method, path in served.asked if "/api/" not in path] == ["HEAD"]


def test_a_file_larger_than_announced_is_cut_off(served, tmp_path):
    served.excess = bytes(1 << 24)
    with pytest.raises(BundleError, match="more came than the"):
        Bundle.open("hf://owner/name")
    assert sum(path.stat().st_size for path in (tmp_path / "cache").rglob("*") if path.is_file()) < 1 << 20


def test_what_travels_through_xet_may_be_more_than_the_file():
    """The Hub's own storage, which is not on loopback: one bar counts the file, a second one what is transferred."""
    reporting = pytest.importorskip("huggingface_hub.utils._xet_progress_reporting")
    report = SimpleNamespace(total_bytes=1000, total_bytes_completed=1000, total_transfer_bytes_completed=1100)
    report.total_bytes_completion_rate = report.total_transfer_bytes_completion_rate = 1.0
    options = {"reconstruction_desc": "", "total": 1000, "log_level": 0, "name": "huggingface_hub.xet_get"}
    bar = HubAddress("owner/name")._bar(1000)
    with reporting.XetDownloadProgressReporter(tqdm_class=bar, **options) as progress:
        progress.update_progress(report)


@pytest.mark.usefixtures("served")
def test_what_is_no_bundle_is_refused_as_any_file(copy):
    copy.write_bytes(b"<html>")
    with pytest.raises(BundleError, match=r"cannot open .*: it is no file that mge knows"):
        Bundle.open("hf://owner/name")


def test_a_missing_extra_says_what_to_install():
    done = run_without(["huggingface_hub"], "mge_runtime.cli.run", "--engine", "hf://owner/name", __file__)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith("install mge again, with its extra hf")

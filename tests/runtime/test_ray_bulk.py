"""Bulk prediction: the predictor of `examples/ray_bulk.py`, what is skipped, and, where Ray is, a worker killed."""

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from examples import ray_bulk
from mge_runtime import Pipeline
from tests.helpers.commands import fails
from tests.helpers.images import NOISE, saved


@pytest.fixture
def folder(tmp_path):
    """Four images: one cut short, one that is missing."""
    (tmp_path / "a.png").write_bytes(saved(NOISE, "PNG"))
    (tmp_path / "b.png").write_bytes(saved(np.flip(NOISE, 0), "PNG"))
    (tmp_path / "cut.jpg").write_bytes(saved(NOISE, "JPEG")[:500])
    return tmp_path


NAMES = ["a.png", "cut.jpg", "gone.png", "b.png"]


@pytest.fixture(params=["path", "bytes"])
def images(request, folder):
    """The images as a table of paths, or of bytes."""
    columns = {"path": NAMES}
    if request.param == "bytes":
        files = (folder / name for name in NAMES)
        columns["bytes"] = [file.read_bytes() if file.exists() else None for file in files]
    return pa.table(columns)


@pytest.mark.parametrize("threads", [1, 2])
def test_each_image_is_a_row_and_a_bad_one_has_an_error(bundle_path, folder, images, threads):
    predictor = ray_bulk.Predictor(str(bundle_path), str(folder), threads=threads, batch=2)
    rows = predictor(images).to_pylist()
    assert [row["path"] for row in rows] == NAMES
    assert [row["error"] is None for row in rows] == [True, False, False, True]
    with Pipeline.open(bundle_path) as pipeline:
        for row in (rows[0], rows[3]):
            expected = pipeline.predict(folder / row["path"])
            assert row["class_name"] == expected.class_name
            assert row["probability"] == pytest.approx(expected.probability, abs=1e-5)
            assert len(row["boxes"]) == row["experts_used"] == expected.experts_used
    for row in rows[1:3]:
        assert row["class_name"] is None
        assert row["error"].isprintable()


def test_a_table_of_bad_images_alone_has_the_same_columns(bundle_path):
    predictor = ray_bulk.Predictor(str(bundle_path))
    for images in (pa.table({"path": ["gone", None]}), pa.table({"path": pa.array([], pa.string())})):
        found = predictor(images)
        assert found.schema == ray_bulk.SCHEMA
        assert len(found) == len(images) == len(found) - found["error"].null_count


def test_what_has_a_row_is_not_predicted_again(bundle_path, folder, images):
    out = folder / "out"
    out.mkdir()
    left = ray_bulk.unfinished(images, ray_bulk.finished(out))
    assert left.equals(images)
    predictor = ray_bulk.Predictor(str(bundle_path), str(folder))
    pq.write_table(predictor(left.slice(0, 2)), out / "1.parquet")
    (out / ".killed.parquet.mge-part").write_bytes(b"half")  # what a killed process leaves is no part
    left = ray_bulk.unfinished(images, ray_bulk.finished(out))
    assert left["path"].to_pylist() == NAMES[2:]
    pq.write_table(predictor(left), out / "2.parquet")
    assert sorted(ray_bulk.finished(out).to_pylist()) == sorted(NAMES)
    assert len(ray_bulk.unfinished(images, ray_bulk.finished(out))) == 0


@pytest.mark.parametrize(
    ("write", "line"),
    [
        (lambda _: None, "cannot read .*: .*; expected a Parquet file or a folder"),
        (lambda path: path.mkdir(), "has the columns ; expected texts in a column path"),
        (lambda path: path.write_bytes(b"text"), "cannot read .*: .*; expected a Parquet file or a folder"),
        (
            lambda path: pq.write_table(pa.table({"image": ["a"]}), path),
            "columns image; expected texts in a column path",
        ),
        (lambda path: pq.write_table(pa.table({"path": [1]}), path), "columns path; expected texts in a column path"),
    ],
)
def test_what_is_no_table_of_images_is_one_line(tmp_path, bundle_path, write, line):
    write(tmp_path / "images.parquet")
    found = fails(ray_bulk.main, "--engine", bundle_path, tmp_path / "images.parquet", tmp_path / "out")
    assert re.search(line, found)
    assert not (tmp_path / "out").exists()


def test_without_ray_one_line_says_what_to_install(bundle_path, folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    pq.write_table(pa.table({"path": NAMES}), folder / "images.parquet")
    line = fails(ray_bulk.main, "--engine", bundle_path, folder / "images.parquet", folder / "out")
    assert "pip install 'ray[data]'" in line


def test_predictions_never_mix_with_images_and_damaged_ones_are_one_line(bundle_path, folder):
    pq.write_table(pa.table({"path": NAMES}), folder / "images.parquet")
    for images in (folder, folder / "images.parquet"):
        assert "is the folder of the images" in fails(ray_bulk.main, "--engine", bundle_path, images, folder)
    (folder / "out").mkdir()
    (folder / "out/damaged.parquet").write_bytes(b"text")
    line = fails(ray_bulk.main, "--engine", bundle_path, folder / "images.parquet", folder / "out")
    assert "cannot read the predictions" in line
    assert "damaged.parquet" in line


def test_a_missing_bundle_is_one_line(folder):
    pq.write_table(pa.table({"path": NAMES}), folder / "images.parquet")
    assert "gone.plan" in fails(
        ray_bulk.main, "--engine", folder / "gone.plan", folder / "images.parquet", folder / "o"
    )


def test_a_folder_that_cannot_be_written_is_one_line(bundle_path, folder, images, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "ray.data", SimpleNamespace())
    pq.write_table(images, folder / "images.parquet")
    out = folder / "a.png" / "out"
    assert "cannot write" in fails(ray_bulk.main, "--engine", bundle_path, folder / "images.parquet", out)


@pytest.mark.slow
def test_ray_goes_on_where_an_earlier_run_stopped(bundle_path, folder, images):
    pytest.importorskip("ray", reason="Ray is not installed: make check-ray says how")
    pq.write_table(images, folder / "images.parquet")
    out = folder / "out"
    words = [sys.executable, "-m", "examples.ray_bulk", "--engine", bundle_path, "--rows", "2", folder, out]
    for _ in range(2):
        subprocess.run(words, check=True, timeout=200)
        assert sorted(ray_bulk.finished(out).to_pylist()) == sorted(NAMES)
        first, second = out.glob("*.parquet")  # so many rows were a worker's, too
        assert len(pq.read_table(first)) == 2
        second.unlink()


@pytest.mark.slow
def test_nothing_is_lost_or_doubled_when_a_worker_is_killed(bundle_path):
    pytest.importorskip("ray", reason="Ray is not installed: make check-ray says how")
    photographs = Path(__file__).parents[2] / "models/photographs"
    words = [sys.executable, "-m", "benchmarks.bulk", "--engine", bundle_path, "--images", "400", "--rows", "50"]
    subprocess.run([*words, photographs], check=True, timeout=280)  # it compares every row

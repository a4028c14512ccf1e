"""The tour in `examples/tour.ipynb`; `python tests/test_notebook.py` runs it at full size and stores its outputs."""

import hashlib
import os
import re
import sys
import tempfile
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="the tour needs nbclient: pip install nbclient ipykernel")
nbclient = pytest.importorskip("nbclient", reason="the tour needs nbclient: pip install nbclient ipykernel")
pytest.importorskip("ipykernel", reason="the tour needs a kernel: pip install ipykernel")

TOUR = Path(__file__).parents[1] / "examples" / "tour.ipynb"
SMALL = {"TRAIN": 48, "VAL": 60, "TEST": 24, "CALIBRATION": 72, "EPOCHS": 1, "EPSILON": 0.5}


def execute(folder, sizes):
    """The committed notebook after its cells ran in `folder`, from the first to the last; one that fails raises."""
    tour = nbformat.read(TOUR, 4)
    here = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # the commands of this environment
    environment = os.environ | {"PATH": here} | {f"TOUR_{name}": str(value) for name, value in sizes.items()}
    where = {"metadata": {"path": str(folder)}}
    nbclient.NotebookClient(tour, timeout=None, coalesce_streams=True, resources=where).execute(env=environment)
    return tour


def code_cells(tour):
    return [cell for cell in tour.cells if cell.cell_type == "code"]


def code_hash(tour):
    return hashlib.sha256("\0".join(cell.source for cell in code_cells(tour)).encode()).hexdigest()


def store(folder):
    """Write the notebook with what a run at full size shows; paths below `folder` become relative."""
    tour = execute(folder, {})
    for cell in code_cells(tour):
        cell.metadata.pop("execution", None)  # times of day
        for output in cell.outputs:
            if "text" in output:
                output["text"] = output["text"].replace(f"{folder}/tour/", "")
    tour.metadata["executed"] = code_hash(tour)
    nbformat.write(tour, TOUR)


@pytest.mark.slow
def test_every_cell_runs(tmp_path):
    tour = execute(tmp_path, SMALL)
    assert [cell.execution_count for cell in code_cells(tour)] == list(range(1, len(code_cells(tour)) + 1))
    assert (tmp_path / "tour" / "mge.plan").exists()


def test_the_stored_outputs_are_of_these_cells():
    tour = nbformat.read(TOUR, 4)
    if "executed" not in tour.metadata:
        pytest.skip("no outputs are stored: python tests/test_notebook.py")
    assert tour.metadata["executed"] == code_hash(tour), "the code has changed: python tests/test_notebook.py"


def test_the_stored_outputs_are_small_and_name_no_folder_of_a_machine():
    text = TOUR.read_text()
    assert len(text) < 400_000
    assert not re.search(r"/(home|root|tmp|work|Users|var)/", text)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        store(Path(scratch).resolve())

"""What lands in site-packages, and what the commands are called."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HOMES = {"mge": ".", "mge_export": "export", "mge_calibration": "calibration", "mge_runtime": "runtime"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (path,) = folder.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        yield archive


def test_the_wheel_holds_the_four_packages_and_nothing_generic(wheel):
    names = {name.partition("/")[0] for name in wheel.namelist()}
    packages = {name for name in names if not name.endswith(".dist-info")}
    assert packages == set(HOMES)
    assert {f"{package}/py.typed" for package in packages} <= set(wheel.namelist())


def test_every_source_file_is_in_the_wheel_and_no_test(wheel):
    sources = {
        path.relative_to(ROOT / home).as_posix()
        for package, home in HOMES.items()
        for path in (ROOT / home / package).rglob("*.py")
    }
    packed = {name for name in wheel.namelist() if name.endswith(".py")}
    assert packed == sources


def test_the_commands_exist_and_explain_themselves(wheel):
    (listing,) = (name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    commands = [line.partition(" = ")[0] for line in wheel.read(listing).decode().splitlines() if " = " in line]
    assert {"mge-train", "mge-eval", "mge-export", "mge-run", "mge-info"} <= set(commands)
    for command in commands:
        path = Path(sys.executable).parent / command
        done = subprocess.run([path, "-h"], capture_output=True, text=True, check=True)
        assert done.stdout.startswith("Usage: ")
        assert "--version" in done.stdout

"""benchmarks/calibration.py and rejection.py on the tiny chain."""

import re
import shutil

import pytest
from click.testing import CliRunner

from benchmarks import rejection
from benchmarks.calibration import main
from tests.helpers.commands import succeeds


@pytest.fixture(scope="module")
def parts(labeled, tmp_path_factory):
    """Three folders of 60 images."""
    folders = [tmp_path_factory.mktemp(name) for name in ("first", "second", "third")]
    for number, path in enumerate(sorted(labeled.glob("*/*"))):
        place = folders[number % 3] / path.parent.name
        place.mkdir(exist_ok=True)
        shutil.copy(path, place)
    return folders


def test_thresholds_are_judged_on_other_images(tiny_path, parts):
    names = ("--data", "--exit-data", "--test-data")
    options = [str(word) for pair in zip(names, parts, strict=True) for word in pair]
    done = CliRunner().invoke(main, [str(tiny_path), *options, "--epsilon", "0.2"])
    assert done.exit_code == 0, done.output
    count, share = re.search(r"on 60 others: (\d+) disagree \(([\d.]+) %\)", done.output).groups()
    assert float(share) == pytest.approx(100 * int(count) / 60, abs=0.01)
    assert len(re.findall(r"NLL [\d.]+ -> [\d.]+ ", done.output)) == 3


def test_splits_of_a_folder_are_counted(tiny_path, parts):
    options = ["--data", str(parts[0]), "--exit-data", str(parts[1]), "--splits", "4", "--share", "0.7"]
    options += ["--epsilon", "0.2"]
    done = CliRunner().invoke(main, [str(tiny_path), *options])
    assert done.exit_code == 0, done.output
    assert "4 random splits, 42 images for thresholds and 18 for the test" in done.output


def test_one_of_both_is_asked_for(tiny_path, parts):
    done = CliRunner().invoke(main, [str(tiny_path), "--data", str(parts[0]), "--exit-data", str(parts[1])])
    assert done.exit_code == 2


def test_rejection_is_judged_on_the_other_half(tiny_path, parts, labeled, tmp_path):
    """With 60 images the 12th score is the threshold at 30 %, so of new ones 12 in 61 fail."""
    table = tmp_path / "labels.csv"
    table.write_text("label,parent\n" + "".join(f"bird {k},bird\n" for k in range(5)))
    options = ("--data", parts[0], "--test-data", labeled, "--unknown", parts[1], "--hierarchy", table)
    done = succeeds(rejection.main, tiny_path, *options, "--epsilon", 0.3, "--share", 0.3, "--splits", 200)
    shares = re.findall(r"(\w+): rejection +60 \+ 60 images: fail ([\d.]+) % \(at most ([\d.]+)", done.output)
    assert len(shares) >= 3
    for _, share, most in shares:
        assert float(share) == pytest.approx(100 * 12 / 61, abs=1.5)
        assert float(most) > 30  # of the half that set the threshold 12 of 60 would fail each time

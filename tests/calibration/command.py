"""`mge-calibrate` as the tests call it."""

from click.testing import CliRunner

from mge_calibration.cli import main
from mge_runtime.bundle import Bundle

EPSILON = ("--epsilon", "0.2")  # 14 images without a disagreement are the least


def calibrate(*arguments):
    return CliRunner().invoke(main, [str(a) for a in (*arguments, "--threads", 1)])


def values_of(path):
    with Bundle.open(path) as bundle:
        calibration = bundle.calibration()
        return None if calibration is None else calibration.values

"""`mge-run` from the outside: what it prints, writes, refuses and survives."""

import csv
import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from mge_runtime import Pipeline
from mge_runtime.bundle import add_calibration
from mge_runtime.cli.run import main
from mge_runtime.machine import cpu_count
from mge_runtime.prediction import softmax
from mge_runtime.report import ImageFolder
from mge_runtime.sources import SAVED_SUFFIX, NamedImage

COMMAND = [sys.executable, "-c", "from mge_runtime.cli.run import main; main(prog_name='mge-run')"]


ORDER = ["in/1.png", "in/2.png", "in/10.png", "in/deep/1.png"]
RAW = os.fsdecode(b"in/\xff.png")  # no UTF-8


@pytest.fixture(autouse=True)
def folder(tmp_path, photos, bundle_path, monkeypatch):
    """A working folder with `mge.plan` and four images, two of them called 1."""
    shutil.copy(bundle_path, tmp_path / "mge.plan")
    monkeypatch.chdir(tmp_path)
    Path("in/deep").mkdir(parents=True)
    for name, pixels in zip(ORDER, photos, strict=False):
        Image.fromarray(pixels).save(name)
    return tmp_path


def run(*arguments, code=0, **options):
    result = CliRunner().invoke(main, [str(a) for a in arguments], catch_exceptions=False, **options)
    assert result.exit_code == code, result.output
    return result


def spawn(script, **options):
    """Run a shell script, to which the command is "$@"."""
    shell = ["sh", "-c", script, "sh", *COMMAND]
    return subprocess.run(shell, capture_output=True, timeout=60, check=False, **options)


def shown(result):
    """The images of lines of text."""
    return [line.split()[-1] for line in result.stdout.splitlines()]


def left():
    return sorted(path.name for path in Path().iterdir())


def copy_raw():
    try:
        shutil.copy("in/1.png", RAW)
    except OSError:
        pytest.skip("this file system takes UTF-8 names alone")


def records(result):
    return [json.loads(line) for line in result.stdout.splitlines()]


def rows(path="table.csv"):
    with Path(path).open(newline="", errors="surrogateescape") as stream:
        return list(csv.DictReader(stream))


@pytest.fixture
def expected(folder):
    with Pipeline.open(folder / "mge.plan") as pipeline:
        return {name: pipeline.predict(folder / name) for name in ORDER}


def test_one_image_is_a_block(expected):
    prediction = expected["in/1.png"]
    lines = run("in/1.png").stdout.splitlines()
    assert lines[0] == "in/1.png"
    assert lines[1].split(maxsplit=1) == [f"{prediction.probability:.1%}", prediction.class_name]
    assert len([line for line in lines if "bird" in line]) == 5
    x0, y0, x1, y1 = prediction.boxes[1]
    assert f"expert 2  counts {prediction.gate[1]:4.0%}, saw x {x0:.0f} to {x1:.0f}, y {y0:.0f} to {y1:.0f}" in lines[7]
    assert lines[-1].endswith(" ms")


def test_several_images_are_a_line_each(expected):
    result = run("in")
    assert shown(result) == ORDER
    for line, name in zip(result.stdout.splitlines(), ORDER, strict=True):
        assert line.strip().startswith(f"{expected[name].probability:.1%}  {expected[name].class_name}  ")
    assert run("in", "--top-k", 2).stdout.count("bird") == 8


def test_json_lines(expected):
    found = records(run("in", "--json", "--top-k", 2, "--batch", 3))
    assert [record.pop("image") for record in found] == ORDER
    for record, name in zip(found, ORDER, strict=True):
        wanted = expected[name].to_dict(top_k=2)
        del record["timings_ms"], wanted["timings_ms"]
        assert record == wanted


def test_csv(expected):
    run("in", "--csv", "table.csv", "--top-k", 9)
    assert [row["image"] for row in rows()] == ORDER
    for row in rows():
        prediction = expected[row["image"]]
        assert row["class_name"] == prediction.class_name
        assert row["class_name_5"] == prediction.top_k(5)[4].name
        assert float(row["gate_3"]) == pytest.approx(prediction.gate[2], abs=1e-5)
        assert [float(row[f"box_3_{e}"]) for e in ("x0", "y0", "x1", "y1")] == pytest.approx(
            prediction.boxes[2].tolist(), abs=0.01
        )


def test_csv_is_streamed_to_standard_output(expected):
    printed = csv.DictReader(run("in", "--csv", "-").stdout.splitlines())
    assert [(row["image"], row["class_name"]) for row in printed] == [(n, expected[n].class_name) for n in ORDER]
    assert "would both be printed" in run("in", "--csv", "-", "--json", code=2).stderr
    copy_raw()
    for where in ("-", "/dev/stdout"):
        done = subprocess.run([*COMMAND, RAW, "--csv", where], capture_output=True, timeout=60, check=True)
        assert done.stdout.splitlines()[1].startswith(b"in/\xff.png,")
    assert left() == ["in", "mge.plan"]


@pytest.mark.parametrize(
    ("script", "line"),
    [
        ('"$@" in >&-', "cannot print: standard output is closed; name another place for the output"),
        ('"$@" in --csv - >&-', "cannot print the CSV table: standard output is closed; name a file for it"),
        ('"$@" in --csv - >/dev/full', "cannot print: No space left on device; name another place for the output"),
        ('"$@" - <&-', "cannot read standard input: it is closed; expected the bytes of one image, pipe them in"),
        ('"$@" - 0>new', "cannot read standard input: Bad file descriptor; expected the bytes of one image"),
        (
            'mkdir gone; cd gone; rmdir ../gone; "$@" ../in',
            "cannot work in this folder: No such file or directory; expected one that exists, cd to it",
        ),
    ],
)
def test_where_nothing_can_be_printed_or_read_it_is_one_line(script, line):
    if "/dev/full" in script and not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    done = spawn(script, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"error: {line}\n")


def test_more_threads_than_processors_are_cut():
    result = run("in/1.png", "-j", 100_000, "--streams", 100_000, "-b", 2)
    assert result.stderr.splitlines() == [
        f"note: {name} 100000 is cut to {cpu_count()}, the processors that this process may use"
        for name in ("--threads", "--streams")
    ]


def test_the_package_is_the_command_and_prints_in_any_encoding():
    shutil.copy("in/1.png", "in/猫.png")
    command = [sys.executable, "-m", "mge_runtime", "in/猫.png"]
    environment = {**os.environ, "PYTHONIOENCODING": "latin-1"}
    done = subprocess.run(command, capture_output=True, env=environment, timeout=60, check=True)
    assert done.stdout.startswith(b"in/?.png\n")


def test_an_early_exit_leaves_out_what_did_not_run():
    run("in", "--csv", "table.csv", "--exit", 1)
    row = rows()[0]
    assert (row["experts_used"], row["calibrated"], row["gate_1"], row["box_2_x0"]) == ("1", "no", "", "")
    assert float(row["total_ms"]) > 0
    assert "counts" not in run("in/1.png", "--exit", 1).stdout
    assert "this chain has 3" in run("in", "--exit", 4, code=1).stderr
    assert "no calibration; learn them with `mge-calibrate" in run("in", "--exit", "calibrated", code=1).stderr


def test_calibrated_exits_and_probabilities(expected):
    exits = {"epsilon": 0.01, "delta": 0.05, "thresholds": {"mean_logits_1": None, "mean_logits_2": 0.0}}
    temperatures = {"mean_logits_1": 4.0, "mean_logits_2": 3.0, "logits": 2.0}
    add_calibration("mge.plan", {"temperatures": temperatures, "exits": exits})
    for exit, experts, extra in (("calibrated", 2, ["--batch", 3]), (1, 1, []), ("never", 3, [])):
        found = records(run("in", "--json", "--csv", "table.csv", "--exit", exit, *extra))
        assert [(r["experts_used"], r["calibrated"]) for r in found] == [(experts, True)] * len(ORDER)
        assert [(r["experts_used"], r["calibrated"]) for r in rows()] == [(str(experts), "yes")] * len(ORDER)
    for record, name in zip(found, ORDER, strict=True):
        assert record["probability"] == pytest.approx(float(softmax(expected[name].logits / 2.0).max()), abs=1e-5)


def test_save_draws_every_image_and_overwrites_none(folder):
    before = {path: path.read_bytes() for path in (folder / "in").rglob("*.png")}
    saved = [record["saved"] for record in records(run("in", "--json", "--save", "out"))]
    assert saved == [f"out/{stem}{SAVED_SUFFIX}" for stem in ("1", "2", "10", "1-2")]
    assert len({Path(path).read_bytes() for path in saved}) == 4
    for path in saved:
        with Image.open(path) as drawn:
            assert min(drawn.size) > 400
    assert {path: path.read_bytes() for path in before} == before
    # Again, among the sources: what was drawn the first time is no source, and no source is written over.
    Image.open("in/1.png").save(f"in/1{SAVED_SUFFIX}")
    named = Path(f"in/1{SAVED_SUFFIX}").read_bytes()
    run("in", f"in/1{SAVED_SUFFIX}", "--save", "in")
    assert Path(f"in/1{SAVED_SUFFIX}").read_bytes() == named
    assert len(run("in").stdout.splitlines()) == 4


@pytest.mark.timeout(10)  # a second; half a minute where each name tries all before it
def test_names_for_many_images_of_one_name_are_found_at_once(tmp_path):
    ImageFolder(tmp_path, [NamedImage(f"{n}/1.jpg", Path(f"/{n}/1.jpg")) for n in range(6000)])


def test_standard_input(expected):
    data = Path("in/2.png").read_bytes()
    record = json.loads(run("-", "--json", "--save", "out", input=data).stdout)
    assert record["image"] == "standard input"
    assert record["class_name"] == expected["in/2.png"].class_name
    assert record["saved"] == f"out/stdin{SAVED_SUFFIX}"
    assert "cannot decode standard input: it is empty (0 bytes)" in run("-", input=b"", code=1).stderr
    assert "cannot decode standard input: it is a text file" in run("-", input=b"no image", code=1).stderr


def test_a_bad_image_is_reported_and_the_rest_predicted():
    Path("in/5.jpg").write_text("no image")
    whole = Path("in/10.png").read_bytes()
    Path("in/6.png").write_bytes(whole[: len(whole) // 2])
    result = run("in", "missing.jpg", "none/*.jpg", "--json", "--csv", "table.csv", "--save", "out", code=1)
    found = {record["image"]: record for record in records(result)}
    failed = ["none/*.jpg", "in/5.jpg", "in/6.png", "missing.jpg"]
    assert [name for name in found if name not in failed] == ORDER
    errors = result.stderr.splitlines()
    assert len(errors) == 5
    assert errors[0].startswith("error: no image matches none/*.jpg")
    assert errors[1] == (
        "error: cannot decode in/5.jpg: it is a text file; "
        "expected a JPEG, PNG, WebP, TIFF, GIF, BMP, PPM or AVIF image"
    )
    assert errors[2].startswith("error: cannot decode in/6.png: image file is truncated")
    assert errors[3].startswith("error: no image at missing.jpg")
    assert errors[4] == "4 of 8 could not be read"
    table = {row["image"]: row for row in rows()}
    assert list(table) == list(found)
    for name in ORDER:
        assert "error" not in found[name]
        assert table[name]["error"] == ""
    for name, line in zip(failed, errors[:4], strict=True):
        assert f"error: {found[name]['error']}" == f"error: {table[name]['error']}" == line
        assert list(found[name]) == ["image", "error"]
        assert table[name]["class_name"] == ""
    assert len(list(Path("out").iterdir())) == 4


def test_lists_bounds_and_what_is_passed_over():
    Path("list.txt").write_text("in/2.png\nin/1.png\n")
    Path("in/notes.txt").touch()
    os.mkfifo("in/pipe.png")
    assert shown(run("@list.txt")) == ["in/2.png", "in/1.png"]
    assert run("--files-from", "-", input=Path("list.txt").read_bytes()).stdout == run("@list.txt").stdout
    assert "note: passed over 2 files: 1 a pipe, socket or device, 1 with another suffix\n" in run("in", code=0).stderr
    assert "expected at most 1e-05 megapixels" in run("in/1.png", "--max-pixels", 10, code=1).stderr
    assert "name images, a list of them with --files-from" in run(code=2).stderr


def test_nothing_to_predict():
    Path("empty").mkdir()
    result = run("empty", "--csv", "table.csv", "--save", "out", code=1)
    assert result.stderr.startswith("error: no image in the folder empty: it holds nothing")
    assert left() == ["empty", "in", "mge.plan"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--csv", "none/table.csv"], "cannot write none/table.csv: No such file or directory"),
        (["--csv", "in"], "cannot write in: it is a folder; expected a file name"),
        (["--save", "mge.plan"], "cannot write images to mge.plan: File exists"),
        (["--save", "a" * 300], f"cannot write images to {'a' * 300}: File name too long"),
        (["--save", "mge.plan/out"], "cannot write images to mge.plan/out: Not a directory"),
        (["--engine", "none.plan"], "none.plan"),
        (["--engine", "in/1.png", "--save", "out"], "in/1.png"),
        (["--device", "toaster"], "the device is 'toaster'"),
    ],
)
def test_what_cannot_work_is_said_before_computing(monkeypatch, options, message):
    monkeypatch.setattr(Pipeline, "predict_iter", lambda *_, **__: pytest.fail("it computed"))
    result = run("in", *options, code=1)
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1
    assert message in result.stderr
    assert left() == ["in", "mge.plan"]


@pytest.mark.parametrize(
    "arguments",
    [
        "in --exit 0", "in --exit calibrate", "in --top-k 0", "in --batch x", "",
        "in - --files-from -", "in - @-", "in @- --files-from -",
    ],
)  # fmt: skip
def test_usage_errors_exit_with_2(arguments):
    run(*arguments.split(), code=2)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_csv_is_not_left_behind(monkeypatch, number):
    Path("table.csv").write_text("old")

    def stop(_, image, *__):
        if image == "in/10.png":
            signal.raise_signal(number)

    monkeypatch.setattr("mge_runtime.report.CsvTable.add", stop)
    result = run("in", "--csv", "table.csv", code=1)
    assert result.stderr == (
        f"error: the run was interrupted ({number.name}): 2 of 4 images were done; table.csv was not written\n"
    )
    assert len(result.stdout.splitlines()) == 3
    assert Path("table.csv").read_text() == "old"
    assert left() == ["in", "mge.plan", "table.csv"]


def test_names_that_would_upset_a_terminal():
    name = "in/\x1b[31mred\nline.png"
    shutil.copy("in/1.png", name)
    assert "\x1b" not in run(name).stdout
    assert run(name).stdout.startswith("in/?[31mred?line.png\n")
    assert json.loads(run(name, "--json").stdout)["image"] == name
    result = run("in", "--engine", "\x1b[31m\x9b.plan", code=1)
    assert result.stderr == result.stderr.replace("\x1b", "").replace("\x9b", "")
    assert "?[31m?.plan" in result.stderr
    copy_raw()
    assert run(RAW, "--csv", "table.csv").stdout.startswith("in/?.png\n")
    assert b"in/\xff.png," in Path("table.csv").read_bytes()
    (line,) = run(RAW, "--json").stdout.splitlines()
    assert "\\ud" not in line  # half a character: some readers of JSON refuse the whole line
    assert json.loads(line)["image"].startswith("in/\ufffd")


def many(count, image):
    """A folder of links to one image."""
    Path("many").mkdir()
    for index in range(count):
        os.link(image, f"many/{index}.png")


def test_many_images_in_a_closed_pipe_end_quietly():
    many(300, "in/1.png")
    done = spawn('"$@" many --csv table.csv | head -n 1')
    assert done.stdout.strip().endswith(b"many/0.png")
    assert done.stderr == b""
    assert left() == ["in", "many", "mge.plan"]


def test_a_terminal_gets_a_progress_bar_and_a_signal_ends_it_in_one_line():
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (600, 600, 3), np.uint8)).save("noise.png")
    many(10_000, "noise.png")  # more than a loaded machine gets through before it is interrupted
    terminal, inner = pty.openpty()
    process = subprocess.Popen([*COMMAND, "many", "--csv", "table.csv"], stdout=subprocess.PIPE, stderr=inner)
    os.close(inner)
    printed = bytearray()

    def watch():  # all the time: a terminal that nobody reads is full after 4 kB, and the command would wait
        with suppress(OSError):  # Linux: the other end is closed
            while True:
                printed.extend(os.read(terminal, 65536))

    watcher = threading.Thread(target=watch)
    watcher.start()
    for _ in range(5):
        assert process.stdout.readline()
    process.terminate()
    process.communicate()
    watcher.join(10)
    os.close(terminal)
    assert process.returncode == 1
    assert b"/10000" in printed
    assert b"error: the run was interrupted (SIGTERM): " in printed
    assert b"Traceback" not in printed
    assert left() == ["in", "many", "mge.plan", "noise.png"]


def test_verbose_shows_what_onnx_runtime_says():
    result = subprocess.run([*COMMAND, "-vv", "in/1.png"], capture_output=True, text=True, check=True)
    assert "onnxruntime" in result.stderr
    assert "in/1.png" in result.stdout

import numpy as np
import pytest

from mge.evaluation import top_k_correct
from mge.parts import part_report, read_parts, view_areas, write_parts
from mge_runtime.errors import InputError, OutputError


def test_report_by_hand():
    parts = np.array([(10, 10, 20, 20), (10, 10, 20, 20), (80, 80, 90, 100)], float)
    frame = (0, 0, 100, 100)
    views = np.array(
        [
            # Whole part at 50 x 50 of 100 x 100: twice as large. Then 25 x 16: sqrt(10000 / 400) = 5.
            (frame, (0, 0, 50, 50), (5, 8, 30, 24)),
            # 9 of 10 columns are just enough, 8 are not. 80 x 80: 1.25; 40 x 40: 2.5.
            (frame, (11, 0, 91, 80), (12, 0, 52, 40)),
            # Lost altogether; then a view of 20 x 5: 10.
            (frame, (0, 0, 40, 40), (80, 0, 100, 5)),
        ],
        float,
    )
    kept, enlargement = part_report(parts, views)
    assert kept == pytest.approx((1.0, 2 / 3, 1 / 3))
    assert enlargement == pytest.approx((1.0, 2.0, 5.0))


def test_enlargement_is_measured_against_the_frame_not_against_the_image():
    parts, views = np.array([(40, 40, 50, 50)], float), np.array([[(20, 10, 80, 70), (30, 30, 60, 60)]], float)
    assert part_report(parts, views)[1] == pytest.approx((1.0, 2.0))
    np.testing.assert_allclose(view_areas(views), [[1, 0.25]])


def test_table_comes_back_as_written(tmp_path):
    parts = {"a, b/0.png": (1, 2, 3, 4), "c/1.png": (0.5, 2.0, 3.25, 9.0)}
    write_parts(tmp_path, parts)
    assert read_parts(tmp_path) == parts
    assert (tmp_path / "parts.csv").read_text().splitlines()[0] == "path,x0,y0,x1,y1"


def test_missing_table_is_none_and_missing_folder_an_error(tmp_path):
    assert read_parts(tmp_path) is None
    with pytest.raises(OutputError):
        write_parts(tmp_path / "nowhere", {})


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", "header"),
        ("name,x0,y0,x1,y1\n", "header"),
        ("path,x0,y0,x1,y1\na,1,2,3\n", "line 2: found 'a,1,2,3'"),
        ("path,x0,y0,x1,y1\na,1,2,3,4\nb,1,2,3,x\n", "line 3: found 'b,1,2,3,x'"),
        ("path,x0,y0,x1,y1\na,1,2,1,4\n", "found 'a,1,2,1,4'"),
        ("path,x0,y0,x1,y1\na,1,2,nan,4\n", "found 'a,1,2,nan,4'"),
        ("path,x0,y0,x1,y1\na,1,2,\udcff,4\n", "cannot be read"),
    ],
)
def test_bad_table_is_named_by_file_and_line(tmp_path, text, found):
    (tmp_path / "parts.csv").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(InputError, match=found) as caught:
        read_parts(tmp_path)
    assert "parts.csv" in str(caught.value)
    assert "expected" in str(caught.value)


def test_top_k():
    logits = np.array([[3.0, 2, 1], [1, 2, 3], [2, 3, 1]])
    labels = np.array([0, 1, 2])
    assert top_k_correct(logits, labels, 1).tolist() == [True, False, False]
    assert top_k_correct(logits, labels, 2).tolist() == [True, True, False]

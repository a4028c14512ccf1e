"""The bundle in the repository opens, is small, and names what its photographs show; `make models` writes it."""

from pathlib import Path

import pytest

from mge_runtime import Bundle, Pipeline

MODELS = Path(__file__).parents[1] / "models"
PLAN = MODELS / "groceries.plan"
PHOTOGRAPHS = sorted((MODELS / "photographs").glob("*.jpg"))

pytestmark = pytest.mark.skipif(not PLAN.exists(), reason="models/groceries.plan is not there: make models")


@pytest.fixture(scope="module")
def pipeline():
    with Pipeline.open(PLAN, device="cpu", threads=1) as opened:
        yield opened


def test_there_are_six_photographs_and_the_file_is_small():
    assert len(PHOTOGRAPHS) == 6
    assert PLAN.stat().st_size <= 15e6


@pytest.mark.parametrize("photograph", PHOTOGRAPHS, ids=lambda path: path.stem)
def test_a_photograph_gets_its_class(pipeline, photograph):
    assert pipeline.predict(photograph).class_name == photograph.stem


def test_its_card_is_of_what_it_is_and_begins_as_its_author_wrote():
    with Bundle.open(PLAN) as bundle:
        bundle.verify()
        card = bundle.card()
        assert bundle.sha256 in card
        assert bundle.calibration() is not None
    words = (MODELS / "groceries.md").read_text().split("---\n", 2)[2].strip()
    assert words in card
    assert "| mixture | " in card

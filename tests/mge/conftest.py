import pytest


@pytest.fixture(autouse=True)
def curves(monkeypatch):
    """No curves are drawn at the end of a training, which takes longer than a tiny one; a test may set what draws."""
    monkeypatch.setattr("mge.training.loop.write_curves", lambda *_: None)

"""Shares and short numbers as pages write them."""

import pytest

from eaft_verl.pages.numbers import share, short


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0 %"), (0.026, "2.6 %"), (0.0057, "0.57 %"), (0.15, "15 %"), (1.0, "100 %"), (-0.0076, "\u22120.76 %")],
)
def test_share(value, text):
    assert share(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0.04451, "0.0445"), (12.34, "12.3"), (1234.5, "1,234"), (-0.5, "\u22120.5"), (0, "0")]
)
def test_short(value, text):
    assert short(value) == text

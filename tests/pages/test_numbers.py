"""Shares and short numbers as pages write them."""

import pytest

from eaft_verl.pages.numbers import share, short


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *[(0.0, "0 %"), (0.026, "2.6 %"), (0.0057, "0.57 %"), (0.15, "15 %"), (1.0, "100 %")],
        *[(36003 / 36005, "99.994 %"), (0.9996, "99.96 %"), (0.9994, "99.9 %"), (1 - 1e-12, "100 %")],
        (-0.0076, "\u22120.76 %"),
        *[(0.0001, "0.01 %"), (3e-5, "0.003 %"), (1e-8, "0.000001 %"), (-3.4e-7, "\u22120.00003 %")],
        *[(1e-9, "1e\u221207 %"), (1e-300, "1e\u2212298 %"), (float("nan"), "\u2013 %")],
    ],
)
def test_share(value, text):
    assert share(value) == text


def test_a_share_that_is_not_zero_is_not_written_as_zero():
    for exponent in range(1, 320, 3):
        assert any(digit in "123456789" for digit in share(4.9 * 10.0**-exponent).split("e")[0]), exponent


@pytest.mark.parametrize(
    ("value", "text"), [(0.04451, "0.0445"), (12.34, "12.3"), (1234.5, "1,234"), (-0.5, "\u22120.5"), (0, "0")]
)
def test_short(value, text):
    assert short(value) == text

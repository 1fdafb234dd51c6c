from __future__ import annotations

from typing import Any

import pytest

from gateway.core.prices import Price, of_model, read_prices
from gateway.core.readers import SettingsError
from gateway.core.usage import Usage


def test_money_is_the_sum_of_what_the_tokens_cost_rounded_up_to_a_millionth() -> None:
    price = Price(prompt=0.6, completion=0.9, cached=0.3)
    assert price.of(Usage(1_000_000, 1_000_000)) == 1_500_000
    assert price.of(Usage(1_000_000, 0, cached_tokens=500_000)) == 450_000
    assert price.of(Usage(1, 0)) == 1
    assert price.of(Usage(10, 0)) == 6
    assert price.of(Usage(10, 0, cached_tokens=99)) == 3
    assert Price(prompt=2.0).of(Usage(10, 5, cached_tokens=10)) == 20


def test_a_model_without_a_price_has_that_of_any_model_or_none() -> None:
    prices = read_prices("f", {"m": {"prompt": 1}, "*": {"prompt": 2.5}})
    assert (of_model(prices, "m").prompt, of_model(prices, "x").prompt) == (1.0, 2.5)
    assert of_model({}, "x").of(Usage(10, 10)) == 0


@pytest.mark.parametrize(
    ("found", "says"),
    [
        ([], "f: prices: not at most"),
        ({"m": 3}, "f: prices: not at most"),
        ({"m": {"promt": 1}}, "f: prices.'m': unknown key 'promt'; known are prompt, completion, cached"),
        ({"m": {"prompt": -1}}, "f: prices.'m'.prompt: -1 is not a number from 0 to 1e+06"),
        ({"m": {"prompt": True}}, "f: prices.'m'.prompt: True is not"),
        ({"m": {"cached": "cheap"}}, "f: prices.'m'.cached: 'cheap' is not"),
    ],
)
def test_a_bad_price_is_named_by_its_path(found: Any, says: str) -> None:
    with pytest.raises(SettingsError) as caught:
        read_prices("f", found)
    assert str(caught.value).startswith(says)

"""What tokens of a model cost: tables ``[prices."model"]`` of the TOML file, which budgets in money go by."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, Final

import msgspec

from . import readers
from .readers import SettingsError
from .record import Record
from .usage import Usage

MAX_PRICES: Final = 10_000
ANY_MODEL: Final = "*"

KEYS: Final = {
    "prompt": "a million tokens of a prompt",
    "completion": "a million tokens of an answer",
    "cached": "a million tokens of a prompt that the backend had in its cache; without it, as `prompt`",
}

EXAMPLE: Final = """\
[prices."llama-3-70b"]
prompt = 0.6
completion = 0.9
cached = 0.3

[prices."*"]
prompt = 0.1
completion = 0.2
"""


class Price(msgspec.Struct, frozen=True):
    """Money per million tokens, which is millionths of money per token."""

    prompt: float = 0.0
    completion: float = 0.0
    cached: float | None = None

    def of(self, usage: Usage) -> int:
        """Millionths of money, rounded up."""
        cached = min(usage.cached_tokens, usage.prompt_tokens)
        prompt = (usage.prompt_tokens - cached) * self.prompt + cached * (self.prompt if self.cached is None else self.cached)
        return math.ceil(round(prompt + usage.completion_tokens * self.completion, 6))


FREE: Final = Price()
Prices = Mapping[str, Price]


def of_record(prices: Prices, record: Record) -> Price:
    """What a request costs: as the model that is served, unless the name asked for has a price of its own and is what is
    served."""
    own = None if record.fell_back else prices.get(record.model)
    return own or of_model(prices, record.served_model or record.model)


def of_model(prices: Prices, model: str) -> Price:
    """The price of a model; else of any; else nothing."""
    return prices.get(model) or prices.get(ANY_MODEL) or FREE


def read_prices(where: str, found: Any) -> Prices:
    """The tables, each value read and named by its path. Raises `SettingsError`."""
    if not isinstance(found, dict) or not all(isinstance(one, dict) for one in found.values()) or len(found) > MAX_PRICES:
        raise SettingsError(f'{where}: prices: not at most {MAX_PRICES} tables, each headed [prices."model"]')
    return {model: _read_price(f"{where}: prices.{readers.shown(model)}", table) for model, table in found.items()}


def _read_price(where: str, table: Mapping[str, Any]) -> Price:
    return Price(**{name: _read(where, name, value) for name, value in table.items()})


def _read(where: str, name: str, value: Any) -> float:
    if name not in KEYS:
        raise SettingsError(f"{where}: unknown key '{name}'; known are {', '.join(KEYS)}")
    try:
        return float(readers.number(0, 1_000_000)(value))
    except ValueError as error:
        raise SettingsError(f"{where}.{name}: {readers.shown(value)} is not {error}") from None


def markdown_lines() -> Iterator[str]:
    """The part of docs/configuration.md on prices."""
    yield "\n## Prices\n\n"
    yield "Budgets in money ([limits.md](limits.md)) go by a table of the TOML file for each model, in any currency.\n"
    yield 'A model without a table costs as `[prices."*"]` says; without that one, nothing.\n\n'
    yield f"```toml\n{EXAMPLE}```\n\n"
    yield "| key | what it is the price of; default 0 |\n|---|---|\n"
    for name, help in KEYS.items():
        yield f"| `{name}` | {help} |\n"

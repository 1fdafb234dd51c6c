from __future__ import annotations

import pytest

from gateway.core import principal
from gateway.core.principal import MAX_NAME, Principal


@pytest.mark.parametrize(
    ("globs", "model", "may"),
    [
        (None, "anything", True),
        (None, "", True),
        ((), "m", False),
        (("m",), "m", True),
        (("m",), "M", False),
        (("m",), "m2", False),
        (("a", "org/m-*"), "org/m-7b", True),
        (("m-?",), "m-12", False),
        (("m-[ab]",), "m-b", True),
        (("m-*",), "", False),
        (("*",), "", True),
    ],
)
def test_a_model_is_asked_for_by_its_name_or_a_pattern(globs: tuple[str, ...] | None, model: str, may: bool) -> None:
    assert Principal(models=globs).may_use(model) is may


def test_of_names_that_no_model_has_nothing_is_kept() -> None:
    before = principal._fits.cache_info().currsize
    assert Principal(models=("x*",)).may_use("x" * (MAX_NAME + 1))
    assert principal._fits.cache_info().currsize == before

"""Asks a running gateway what only its operators may know."""

from __future__ import annotations

import http.client
import urllib.error
import urllib.request
from typing import Any, Final, TypeVar

import msgspec

from .core.errors import UNDECODABLE
from .core.view import shown

TIMEOUT: Final = 5.0

Asked = TypeVar("Asked")


class NotTold(Exception):
    """There is no answer, for a reason that is one line."""


def ask(url: str, path: str, key: str, type: type[Asked] | Any) -> Any:
    """What the gateway at this base URL answers. Raises `NotTold`."""
    try:
        request = urllib.request.Request(url.rstrip("/") + path)  # noqa: S310 - an operator's own URL
        if key:
            request.add_header("Authorization", f"Bearer {key}")
        with urllib.request.urlopen(request, timeout=TIMEOUT) as response:  # noqa: S310
            return msgspec.json.decode(response.read(), type=type)
    except urllib.error.HTTPError as error:
        with error:
            raise NotTold(_refused(error.code, path)) from None
    except urllib.error.URLError as error:
        raise NotTold(f"{url}: {shown(str(error.reason), 200)}") from None
    except (OSError, ValueError, http.client.HTTPException, *UNDECODABLE) as problem:
        raise NotTold(f"{url}: {shown(str(problem), 200)}") from None


def _refused(status: int, path: str) -> str:
    if status in (401, 403):
        return "the gateway asks for a key with admin: set GATEWAY_ADMIN_KEY"
    if status == 404:
        return f"there is no {path}: see the setting GATEWAY_ADMIN"
    return f"the gateway answered with status {status}"

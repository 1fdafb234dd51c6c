"""Requests: a public trace of conversations, generated tool traffic, and as many users of them as a load needs."""

from __future__ import annotations

import gzip
import json
import random
from functools import cache
from pathlib import Path
from typing import Final, NamedTuple

from gateway.core.prefix import Blocks

from .engine import PROFILES, Profile, Request, prefill_seconds

TRACE: Final = Path(__file__).parent / "mooncake_conversation_trace.jsonl.gz"
BLOCK: Final = 512
LOADS: Final = {"conversation": (0.5, 0.65, 0.8), "tools": (0.5, 0.7, 0.85)}
_COMMON: Final = 0.02  # a block in more than this part of the requests is a shared system prompt, and tells no conversation


class Row(NamedTuple):
    """A request of a trace. ``common``: its first so many blocks are the same for all users."""

    at: float
    tokens: int
    output: int
    blocks: tuple[int, ...]
    session: int
    common: int = 0


@cache
def conversation() -> list[Row]:
    """Mooncake's conversations; their times, rounded to 3 s, are spread within those."""
    rng = random.Random(11)
    with gzip.open(TRACE, "rt") as lines:
        entries = [json.loads(line) for line in lines]
    rows = []
    for entry in entries:
        at = (entry["timestamp"] + rng.random() * 3000) / 1000
        rows.append(Row(at, max(1, entry["input_length"]), max(1, entry["output_length"]), tuple(entry["hash_ids"]), -1))
    return _with_sessions(sorted(rows, key=lambda row: row.at))


def _with_sessions(rows: list[Row]) -> list[Row]:
    """A request goes on with the conversation of the latest one whose prefix it extends by a block that is not common."""
    common = _common_blocks(rows)
    owner: dict[int, int] = {}
    found = []
    for number, row in enumerate(rows):
        session = next((owner[block] for block in reversed(row.blocks) if block in owner and block not in common), number)
        owner.update(dict.fromkeys(row.blocks, session))
        found.append(row._replace(session=session))
    return found


def _common_blocks(rows: list[Row]) -> set[int]:
    counts: dict[int, int] = {}
    for row in rows:
        for block in row.blocks:
            counts[block] = counts.get(block, 0) + 1
    return {block for block, count in counts.items() if count > max(3.0, _COMMON * len(rows))}


@cache
def tools() -> list[Row]:
    """Generated to the published aggregates of Mooncake's tool and agent trace (6.56 requests a second, 8,596 tokens in, 182
    out, 59% of them repeated): 60 tool prompts of 1,000 to 5,000 tokens, Zipf popular, tasks of 1 to 10 calls that grow
    by tool results."""
    rng = random.Random(3)
    sizes = [int(rng.uniform(1, 5) * 1024) // BLOCK for _ in range(60)]
    weights = [1 / (i + 1) for i in range(60)]
    rows: list[Row] = []
    serial = sum(sizes) + 1
    starts = [1 + sum(sizes[:i]) for i in range(60)]
    session = 0
    while len(rows) < 12_000:
        app = rng.choices(range(60), weights)[0]
        serial = _task(rng, rows, serial, session, list(range(starts[app], starts[app] + sizes[app])))
        session += 1
    return sorted(rows, key=lambda row: row.at)[:12_000]


def _task(rng: random.Random, rows: list[Row], serial: int, session: int, blocks: list[int]) -> int:
    """Add the calls of one task; the next free block."""
    common = len(blocks)
    at = rng.random() * 1800.0
    calls = min(10, 1 + int(rng.expovariate(1 / 1.3)))
    tokens = common * BLOCK + int(rng.lognormvariate(7.55, 1.2)) + 16
    for _ in range(calls):
        new = -(-tokens // BLOCK) - len(blocks)
        held = [*blocks, *range(serial, serial + new)]
        serial += max(new, 0)
        output = max(1, int(rng.lognormvariate(4.62, 1.08)))
        if tokens <= 120_000 and at <= 1800.0:
            rows.append(Row(at, tokens, min(output, 2000), tuple(held), session, common))
        blocks = held[: tokens // BLOCK]  # only whole blocks stay as they are
        tokens += output + int(rng.lognormvariate(6.9, 1.3))
        at += rng.lognormvariate(1.6, 0.9) + output * 0.03
    return serial


@cache
def tenants() -> list[Row]:
    """Generated: 600 tenants, Zipf popular, each with a system prompt of its own of 2,000 to 8,000 tokens, and single questions
    of some hundred. All prompts fit once into the caches of eight backends, and not into one."""
    rng = random.Random(9)
    sizes = [int(rng.uniform(2, 8) * 1024) // BLOCK for _ in range(600)]
    starts = [1 + sum(sizes[:i]) for i in range(600)]
    weights = [(i + 1) ** -0.8 for i in range(600)]
    serial = sum(sizes) + 1
    rows: list[Row] = []
    for session in range(12_000):
        one = rng.choices(range(600), weights)[0]
        tokens = sizes[one] * BLOCK + int(rng.lognormvariate(5.5, 0.8)) + 16
        new = -(-tokens // BLOCK) - sizes[one]
        blocks = (*range(starts[one], starts[one] + sizes[one]), *range(serial, serial + new))
        serial += new
        output = min(max(1, int(rng.lognormvariate(4.8, 0.9))), 2000)
        rows.append(Row(rng.random() * 1800.0, tokens, output, blocks, session, sizes[one]))
    return sorted(rows, key=lambda row: row.at)


def demand(rows: list[Row], profile: Profile) -> float:
    """Engine seconds for each second of the trace, if one infinite cache served all and decoding went 16 at a time."""
    seen: set[int] = set()
    seconds = 0.0
    for row in rows:
        depth = next((k for k, block in enumerate(row.blocks) if block not in seen), len(row.blocks))
        seen.update(row.blocks)
        cached = min(depth * BLOCK, row.tokens - 1)
        seconds += prefill_seconds(profile, row.tokens - cached, cached)
        step = profile.read * (row.tokens + row.output / 2) + (profile.overhead + profile.weights) / 16
        seconds += row.output * step
    return seconds / (rows[-1].at - rows[0].at)


def users(rows: list[Row], factor: float, seed: int) -> list[Row]:
    """So many times the users: whole sessions left out, or copied, with contents of their own, to another time."""
    rng = random.Random(seed)
    length = max(row.at for row in rows) + 1e-9
    common = _common_blocks(rows)
    for row in rows:
        common.update(row.blocks[: row.common])
    chosen: list[Row] = []
    for copy in range(int(factor) + (factor > int(factor))):
        part = factor - copy
        shift = rng.random() * length if copy else 0.0
        moved: dict[int, float | None] = {}
        for row in rows:
            if row.session not in moved:
                kept = part >= 1 or rng.random() < part
                moved[row.session] = (row.at + shift) % length - row.at if kept else None
            move = moved[row.session]
            if move is not None and row.at + move <= length:
                blocks = tuple([-1 - block if block in common else (block + 1) * 64 + copy for block in row.blocks])
                chosen.append(row._replace(at=row.at + move, blocks=blocks, session=row.session * 64 + copy))
    return sorted(chosen, key=lambda row: row.at)


def make(name: str, profile: str, n: int, load: float, seed: int, seconds: float = float("inf")) -> list[Request]:
    """The requests of a workload (its first so many seconds) at a load of ``n`` backends."""
    engine = PROFILES[profile]
    most = engine.kv * 0.8
    rows = [
        row
        for row in {"conversation": conversation, "tools": tools, "tenants": tenants}[name]()
        if row.tokens + row.output <= most
    ]
    rows = [row for row in rows if row.at < seconds]
    rows = users(rows, load * n / demand(rows, engine), seed)
    latest: dict[int, int] = {}
    requests = []
    for rid, row in enumerate(rows):
        ends = [min((k + 1) * BLOCK, row.tokens) for k in range(len(row.blocks))]
        prompt = Blocks(list(row.blocks), ends, row.tokens, [str(block) for block in row.blocks])
        requests.append(Request(rid, row.at, prompt, row.output, str(row.session), latest.get(row.session)))
        latest[row.session] = rid
    return requests

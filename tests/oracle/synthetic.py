"""Made-up histories whose true order is known, to try the checker on."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from oracle.history import WRITE, ZERO, History, Request, View
from oracle.stamps import ZEROS, identity

SECTORS = 256
TRANSFER_SECTORS_MAX = 48


@dataclass(frozen=True)
class Event:
    """A request and the instant at which it really happened."""

    request: Request
    at_ns: int


def make_events(seed: int, count: int = 240, writers: int = 3) -> list[Event]:
    """Writers with one request after the other each, overlapping those of the others."""
    choose = random.Random(seed)
    events = []
    for writer in range(1, writers + 1):
        now = choose.randrange(1000)
        for sequence in range(count // writers):
            length = choose.randint(1, TRANSFER_SECTORS_MAX)
            first = choose.randrange(SECTORS - length)
            ended = now + choose.randint(10, 300)
            kind = ZERO if choose.random() < 0.2 else WRITE
            request = Request(writer, sequence, kind, first, first + length, now, ended)
            events.append(Event(request, choose.randint(now + 1, ended)))
            now = ended + choose.randint(1, 200)
    return sorted(events, key=lambda event: event.at_ns)


def history_of(events: Sequence[Event]) -> History:
    return History([event.request for event in events], SECTORS)


def view_of(events: Sequence[Event], at_ns: int) -> View:
    """The true view: what happened up to the instant, in the order of ``events``."""
    return replay([event for event in events if event.at_ns <= at_ns], at_ns)


def replay(events: Sequence[Event], at_ns: int) -> View:
    sectors = np.full(SECTORS, ZEROS, np.int64)
    for event in events:
        _, _, kind, first, after, *_ = event.request
        sectors[first:after] = ZEROS if kind == ZERO else identity(*event.request[:2])
    return View(at_ns, sectors)

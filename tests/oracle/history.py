"""What an observer saw of the load: each request with the instants of its issue and its end.

A request took effect at one instant in [issued, ended]. ``acknowledged`` is False where the server
was lost (or refused) before it answered: then it may have happened, whole, in part, or not at all,
but not after ``ended``, when the loss was seen.

Instants are stamps: CLOCK_MONOTONIC plus the source's offset, in ns. A view is what a disk showed
at an instant: per sector the identity of the request that put it there (see stamps).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from oracle.stamps import Ids, identity

WRITE, ZERO, FLUSH = 0, 1, 2  # trims are zeros: they must read so


class Request(NamedTuple):
    writer: int
    sequence: int
    kind: int
    first: int  # sector
    after: int  # sector
    issued_ns: int
    ended_ns: int
    acknowledged: bool = True


@dataclass(frozen=True)
class View:
    at_ns: int
    sectors: Ids
    name: str = ""


class History:
    """Requests as columns, in the order of their issue; flushes apart."""

    def __init__(self, requests: Iterable[Request], sectors: int) -> None:
        ordered = sorted(requests, key=lambda request: request.issued_ns)
        self.flushes = [request for request in ordered if request.kind == FLUSH]
        self.requests = [request for request in ordered if request.kind != FLUSH]
        self.sectors = sectors
        columns = np.array([request[2:] for request in self.requests], np.int64).reshape(-1, 6)
        self.kind, self.first, self.after, self.issued, self.ended = columns.T[:5]
        self.acknowledged = columns[:, 5] != 0
        ids = np.array([identity(*request[:2]) for request in self.requests], np.int64)
        self._order = np.argsort(ids)
        self._ids = ids[self._order]

    def __len__(self) -> int:
        return len(self.requests)

    def find(self, ids: Ids) -> Ids:
        """Indices of the requests with these identities; -1 where there is none."""
        place = np.minimum(np.searchsorted(self._ids, ids), len(self._ids) - 1)
        return np.where(self._ids[place] == ids, self._order[place], -1)

    def describe(self, index: int) -> str:
        request = self.requests[index]
        return f"{request.writer}/{request.sequence} [{request.first}, {request.after})"

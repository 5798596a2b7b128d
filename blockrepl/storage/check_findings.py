"""What a check of a store finds.

========  ===================================================================================
severity  means
========  ===================================================================================
lost      primary data is damaged: bytes that some instants showed, or the catalog
derived   what can be made again from the rest: indexes, seals, the durable record
leftover  what a crash has left behind, or a file that is none of ours
========  ===================================================================================

A lost finding names the interval of instants in which ``ranges`` of ``disk`` cannot be read:
[from_ns, to_ns), ``to_ns`` None when the newest instant is among them. It has no ranges when no
instant shows what is damaged (a mark, a flush). Outside of both nothing is affected.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from blockrepl.formats.frame import U64
from blockrepl.formats.run import Run

Severity = Literal["lost", "derived", "leftover"]

SEVERITIES: dict[str, Severity] = {
    "catalog": "lost",  # SQLite's own check, or a row that contradicts others
    "segment-missing": "lost",
    "segment": "lost",  # a file that cannot be told to be the segment
    "frames": "lost",  # from here on frames cannot be found
    "frame": "lost",  # one frame's header or columns
    "block": "lost",  # 64 KiB of a frame's payload
    "numbers": "lost",  # frames that were acknowledged and are in no segment
    "base": "lost",
    "fork": "lost",
    "segment-header": "derived",  # of a sealed segment: the catalog has all that it says
    "seal": "derived",  # trailer or contents, or bytes missing behind the frames
    "frame-table": "derived",
    "index": "derived",  # an index run that does not match its digests
    "index-differs": "derived",  # one that does, but not the frames
    "file-digest": "derived",
    "merged-run": "derived",
    "durable-record": "derived",
    "torn-tail": "leftover",  # of the open segment: never acknowledged
    "unfinished": "leftover",  # made for something that never came about
    "stale-index": "leftover",  # a merged run of segments that are no more
    "void-pin": "leftover",
    "unknown": "leftover",  # none of ours: named, never touched
}


ALL_FRAMES = (0, 1 << 32)


@dataclass(slots=True)
class Finding:
    """``file`` is relative to the replica's directory."""

    code: str
    group: str
    file: str
    what: str
    offset: int | None = None
    disk: str | None = None
    from_ns: int | None = None
    to_ns: int | None = None
    ranges: list[tuple[int, int]] = field(default_factory=list)
    repaired: bool = False
    segment: int | None = None  # the number of the segment it is of

    @property
    def severity(self) -> Severity:
        return SEVERITIES[self.code]

    def as_json(self) -> dict[str, Any]:
        return {
            "code": self.code,
            "severity": self.severity,
            "group": self.group,
            "file": self.file,
            "what": self.what,
            "offset": self.offset,
            "disk": self.disk,
            "from_ns": self.from_ns,
            "to_ns": self.to_ns,
            "ranges": [list(each) for each in self.ranges],
            "repaired": self.repaired,
        }


@dataclass(frozen=True, slots=True)
class Pieces:
    """What of a disk's records is lost: [starts, ends) as written at ``stamps``."""

    starts: U64
    ends: U64
    stamps: U64

    @classmethod
    def of(cls, run: Run) -> Pieces:
        return cls(run.starts, run.ends, run.stamps)

    def __len__(self) -> int:
        return len(self.starts)


@dataclass(slots=True)
class Lost:
    """A lost finding, and what is known of its records, to be told as interval and ranges.

    ``pieces`` by disk; None: not known (yet). Then frames [first, last) of the segment file at
    ``place`` are those that an index may know, and ``disk`` whose they are (None: any disk of
    ``source``'s; None: of anyone's).
    """

    finding: Finding
    disk: bytes | None
    first_stamp: int
    pieces: dict[bytes, Pieces] | None = None
    place: int = 0
    ordinals: tuple[int, int] = ALL_FRAMES
    source: bytes | None = None

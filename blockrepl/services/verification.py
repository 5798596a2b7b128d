"""What `verify` says: per disk what is proven, what was found to differ, how the last pass stands.

Proofs and mismatches are the receiver's (storage/proofs.py), for it compares; how a pass stands is
the source's, for it reads (scrubber.py), and the receiver knows it as the source told it last.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from pydantic import BaseModel

from blockrepl.formats.messages import ScrubPass
from blockrepl.storage.catalog import DiskRow
from blockrepl.storage.history import ReplicaHistory
from blockrepl.storage.proofs import Mismatch, Proofs
from blockrepl.units import NANOSECONDS_PER_SECOND, format_instant

FOUND_MAX = 100  # mismatches that are named in one answer, the newest: it must fit a message


class PassStatus(BaseModel):
    """``progress``: 0 to 1. A pass without ``ended_ns`` is under way."""

    started_ns: int
    ended_ns: int | None
    is_asked_for: bool
    progress: float
    skipped_regions: int
    differing_regions: int
    bytes_per_second: float

    @classmethod
    def of(cls, told: ScrubPass) -> PassStatus:
        return cls(**told.model_dump(exclude={"disk"}))


class Difference(BaseModel):
    """Bytes that differed at ``at_ns``; proven before at ``proven_ns``, again at ``healed_ns``."""

    start: int
    length: int
    at: str
    at_ns: int
    proven_ns: int | None
    healed_ns: int | None

    @classmethod
    def of(cls, found: Mismatch) -> Difference:
        return cls(
            start=found.start,
            length=found.length,
            at=format_instant(found.at_ns),
            at_ns=found.at_ns,
            proven_ns=found.proven_ns,
            healed_ns=found.healed_ns,
        )


class DiskProof(BaseModel):
    """``mismatches`` counts those that are not healed; ``found`` names healed ones too.

    ``unreadable``: why some of the disk could not be compared, when it was tried last; None when
    all could.
    """

    disk: str
    covered_bytes: int
    size_bytes: int
    mismatches: int
    oldest_proof_ns: int | None
    oldest_proof: str | None
    age_seconds: float | None
    scrub: PassStatus | None
    found: list[Difference]
    unreadable: str | None = None


def describe_proofs(
    proofs: Proofs,
    disks: Iterable[DiskRow],
    passes: Mapping[bytes, ScrubPass],
    unreadable: Mapping[bytes, str],
    now: int,
) -> list[DiskProof]:
    """Blocks. StorageError. ``unreadable``: why disks cannot be compared, by id."""
    found = [one for disk in disks for one in proofs.mismatches(disk.id, healed_too=True)]
    found.sort(key=lambda one: (one.healed_ns is not None, -one.at_ns))
    named = found[:FOUND_MAX]
    return [
        _describe(proofs, disk, passes.get(disk.id), named, unreadable.get(disk.id), now)
        for disk in disks
    ]


def _describe(
    proofs: Proofs,
    disk: DiskRow,
    told: ScrubPass | None,
    named: list[Mismatch],
    unreadable: str | None,
    now: int,
) -> DiskProof:
    proven = proofs.proven(disk.id, disk.size_bytes)
    oldest = proven.oldest_ns
    mine = sorted((one for one in named if one.disk == disk.id), key=lambda one: one.start)
    return DiskProof(
        disk=disk.name,
        covered_bytes=proven.covered_bytes,
        size_bytes=disk.size_bytes,
        mismatches=proven.mismatches,
        oldest_proof_ns=oldest,
        oldest_proof=None if oldest is None else format_instant(oldest),
        age_seconds=None if oldest is None else max(0, now - oldest) / NANOSECONDS_PER_SECOND,
        scrub=PassStatus.of(told) if told else None,
        found=[Difference.of(one) for one in mine],
        unreadable=unreadable,
    )


def proofs_at_rest(home: Path, group: str, now: int) -> list[DiskProof]:
    """Of a receiver that is not running, from its files. Blocks. StateError, StorageError."""
    with ReplicaHistory.open(home, group) as history:
        disks = [disk for disk in history.catalog.disks() if disk.removed_ns is None]
        return describe_proofs(Proofs(history.catalog), disks, {}, {}, now)

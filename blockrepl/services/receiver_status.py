"""What the receiver says of its groups, from a live replica or from the files of one at rest.

======================================  =============
of a group, the first that holds        state
======================================  =============
its replica cannot be used              error
a source that is here is refused with   error
it
a source with disks in it is not here   disconnected
a disk's first sync is not done         initial-sync
a disk's gap is open                    resync
otherwise                               replicating
======================================  =============

Stamps are the sources' clocks'. Where they are CLOCK_AHEAD_SECONDS and more ahead of this one, lag
means nothing: it is unknown, and the status says how far they are ahead. That goes for records as
for watermarks: a fold waits until the youngest of a segment's is old. None is refused for it: a
source whose clock is ahead, or that sends records while its watermark is held, is honest.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from blockrepl import limits
from blockrepl.errors import BlockreplError, explain
from blockrepl.formats.messages import ScrubPass
from blockrepl.services.receiver_api import (
    DiskStatus,
    GapStatus,
    GroupState,
    GroupStatus,
    SourceStatus,
    Status,
)
from blockrepl.services.receiver_home import read_configuration
from blockrepl.services.retention_status import HistoryOutlook, describe_retention
from blockrepl.services.verification import PassStatus
from blockrepl.storage.catalog import Catalog, DiskRow, GapRow, SegmentRow
from blockrepl.storage.history import ReplicaHistory
from blockrepl.storage.home import Home
from blockrepl.storage.proofs import Proofs, Proven
from blockrepl.storage.replica import Replica
from blockrepl.units import NANOSECONDS_PER_SECOND, format_instant


@dataclass(frozen=True, slots=True)
class GroupFacts:
    """What is known of a group. ``now`` is when ``watermark`` had been read: the rest takes its
    time, which is no lag.
    """

    name: str
    watermark: int = 0
    now: int = field(default_factory=time.time_ns)
    journal_bytes: int = 0
    disks: Sequence[DiskRow] = ()
    floor_ns: int | None = None
    gaps: Sequence[GapRow] = ()
    base_bytes: Mapping[bytes, int] = field(default_factory=dict)
    error: BlockreplError | None = None
    proven: Mapping[bytes, Proven] = field(default_factory=dict)
    newest_watermark: int = 0  # of the source that is furthest
    newest_stamp: int = 0  # of all records
    outlook: HistoryOutlook | None = None
    unreadable: Sequence[str] = ()  # why which disks cannot be compared with their source


def facts_of(
    replica: Replica, problem: str = "", unreadable: Mapping[bytes, str] | None = None
) -> GroupFacts:
    """Reads the catalog: blocks. Never raises. ``problem``: of retention; ``unreadable``: why disks
    cannot be compared, by id.
    """
    status, now = replica.status(), time.time_ns()
    rows: list[SegmentRow] | None = None
    proven: dict[bytes, Proven] = {}
    with suppress(BlockreplError):  # the group's error says it
        rows = replica.segments()
    seen = _outlook(replica.directory, replica.catalog, rows, replica.newest_ns(), problem)
    with suppress(BlockreplError):
        proven = {row.id: replica.proofs.proven(row.id, row.size_bytes) for row in status.disks}
    return GroupFacts(
        status.name,
        status.watermark,
        now,
        status.journal_bytes,
        status.disks,
        status.floor_ns,
        status.gaps,
        status.base_bytes,
        status.error,
        proven,
        max((row.watermark for row in status.sources.values()), default=0),
        _newest_stamp(rows or ()),
        seen,
        sorted((unreadable or {}).values()),
    )


def facts_of_failed(directory: Path, error: BlockreplError) -> GroupFacts:
    """Of a group that cannot be used: what its files say. Blocks. Never raises."""
    return replace(_facts_at_rest(directory), error=error)


def _outlook(
    directory: Path,
    catalog: Catalog,
    rows: Sequence[SegmentRow] | None,
    latest_ns: int,
    problem: str,
) -> HistoryOutlook | None:
    with suppress(BlockreplError, OSError):
        if rows is not None:
            told = describe_retention(directory, catalog, rows, latest_ns, problem)
            return HistoryOutlook.of(told)
    return None


def _newest_stamp(rows: Sequence[SegmentRow]) -> int:
    return max((row.last_stamp for row in rows), default=0)


def describe_group(
    facts: GroupFacts,
    *,
    connected: Collection[bytes],
    source_names: Mapping[bytes, str],
    bytes_per_second: float = 0.0,
    passes: Mapping[bytes, ScrubPass] | None = None,
    refused: Mapping[bytes, BlockreplError] | None = None,
) -> GroupStatus:
    """``connected`` are the sources with a session that has attached the group; ``refused`` says
    why the group does not take what others with a session have.
    """
    refused = refused or {}
    floor = facts.floor_ns
    latest = facts.watermark if floor is not None and facts.watermark >= floor else None
    sources = sorted({disk.source for disk in facts.disks})
    names = {disk.id: disk.name for disk in facts.disks}
    ahead_seconds = _ahead_seconds(facts)
    return GroupStatus(
        name=facts.name,
        state=_group_state(facts, connected, refused),
        lag_seconds=max(0.0, (facts.now - facts.watermark) / NANOSECONDS_PER_SECOND)
        if facts.watermark and ahead_seconds is None
        else None,
        ahead_seconds=ahead_seconds,
        floor=_instant(floor),
        floor_ns=floor,
        latest=_instant(latest),
        latest_ns=latest,
        gaps=[
            GapStatus(disk=names.get(gap.disk, ""), from_ns=gap.from_ns, to_ns=gap.to_ns)
            for gap in facts.gaps
        ],
        journal_bytes=facts.journal_bytes,
        disks=[
            _disk_status(
                facts,
                disk,
                _disk_state(facts, disk, connected, refused),
                source_names,
                (passes or {}).get(disk.id),
            )
            for disk in facts.disks
        ],
        problem=_problem(facts, ahead_seconds, _refusals(refused, source_names)),
        received_bytes_per_second=bytes_per_second,
        sources=[
            SourceStatus(
                name=_source_name(source, source_names),
                connected=source in connected or source in refused,
            )
            for source in sources
        ],
        retention=facts.outlook,
    )


def newest_gaps(gaps: Sequence[GapStatus], count: int) -> list[GapStatus]:
    """So many, by instant; those that are open before all others."""
    by_age = sorted(gaps, key=lambda gap: (gap.to_ns is None, gap.from_ns))
    return sorted(by_age[-count:], key=lambda gap: gap.from_ns)


def _disk_status(
    facts: GroupFacts,
    disk: DiskRow,
    state: GroupState,
    source_names: Mapping[bytes, str],
    scrub: ScrubPass | None,
) -> DiskStatus:
    proven = facts.proven.get(disk.id)
    return DiskStatus(
        name=disk.name,
        size_bytes=disk.size_bytes,
        state=state,
        verified_ns=proven.oldest_ns if proven and proven.is_whole else None,
        mismatches=proven.mismatches if proven else 0,
        scrub=PassStatus.of(scrub) if scrub else None,
        synced_bytes=facts.base_bytes.get(disk.id, 0),
        source=_source_name(disk.source, source_names),
    )


def _ahead_seconds(facts: GroupFacts) -> float | None:
    newest = max(facts.watermark, facts.newest_watermark, facts.newest_stamp)
    ahead_seconds = (newest - facts.now) / NANOSECONDS_PER_SECOND
    return ahead_seconds if ahead_seconds >= limits.CLOCK_AHEAD_SECONDS else None


def _problem(facts: GroupFacts, ahead_seconds: float | None, refusals: str) -> str | None:
    if facts.error is not None:
        return explain(facts.error)
    if refusals:
        return refusals
    return "; ".join(facts.unreadable) or _clock_problem(ahead_seconds)


def _refusals(refused: Mapping[bytes, BlockreplError], names: Mapping[bytes, str]) -> str:
    return "; ".join(
        f"source {_source_name(source, names)} is refused: {explain(error)}"
        for source, error in refused.items()
    )


def _clock_problem(ahead_seconds: float | None) -> str | None:
    if ahead_seconds is None:
        return None
    return (
        f"a source's clock is {ahead_seconds:.0f} s ahead of this receiver's: its points carry its "
        "time, the lag is unknown, and what is journaled from there on is not let go before that "
        "time. Set the clock that is wrong"
    )


def _group_state(
    facts: GroupFacts, connected: Collection[bytes], refused: Collection[bytes]
) -> GroupState:
    if facts.error is not None or refused:
        return "error"
    states = {_disk_state(facts, disk, connected, ()) for disk in facts.disks} or {"disconnected"}
    order: tuple[GroupState, ...] = ("disconnected", "initial-sync", "resync", "replicating")
    return next(state for state in order if state in states)


def _disk_state(
    facts: GroupFacts, disk: DiskRow, connected: Collection[bytes], refused: Collection[bytes]
) -> GroupState:
    if facts.error is not None or disk.source in refused:
        return "error"
    if disk.source not in connected:
        return "disconnected"
    if disk.ready_ns is None:
        return "initial-sync"
    if any(gap.disk == disk.id and gap.to_ns is None for gap in facts.gaps):
        return "resync"
    return "replicating"


def _source_name(source: bytes, names: Mapping[bytes, str]) -> str:
    return names.get(source, source.hex())


def _instant(stamp: int | None) -> str | None:
    return None if stamp is None else format_instant(stamp)


def status_at_rest(home: Home) -> Status:
    """The status of a receiver that is not running, from its files. Blocks."""
    groups = [
        describe_group(_facts_at_rest(home.replica_directory(name)), connected=(), source_names={})
        for name in home.groups()
    ]
    return Status(name=read_configuration(home).name, running=False, groups=groups)


def _facts_at_rest(directory: Path) -> GroupFacts:
    try:
        with ReplicaHistory(directory) as history:
            state, now = history.state(), time.time_ns()
            proofs = Proofs(history.catalog)
            rows = history.catalog.segments()
            return GroupFacts(
                history.group,
                state.latest_ns,
                now,
                sum(path.stat().st_size for path in (directory / "segments").glob("*.seg")),
                [disk for disk in state.disks if disk.removed_ns is None],
                history.history(state).floor_ns,
                state.gaps,
                proven={row.id: proofs.proven(row.id, row.size_bytes) for row in state.disks},
                newest_stamp=_newest_stamp(rows),
                outlook=_outlook(directory, history.catalog, rows, min(state.latest_ns, now), ""),
            )
    except BlockreplError as error:
        return GroupFacts(directory.name, error=error)

"""Passes of retention over a real replica: what the ladder keeps stays, what is pinned stays."""

from __future__ import annotations

import errno
import os
import select
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio
from journal_model import Journal, small_segments
from test_thinning import SIZES, check
from test_view import flip

from blockrepl.errors import DamageError, PointError, StateError, StorageError
from blockrepl.formats.marks import ConsistentMark, GapMark
from blockrepl.model.points import Instant, Point
from blockrepl.services.group_committer import GroupCommitter, MemoryBudget
from blockrepl.services.receiver import Receiver
from blockrepl.services.receiver_status import facts_of
from blockrepl.services.retention import Retention
from blockrepl.services.retention_status import HistoryOutlook, describe_retention
from blockrepl.storage import pins, retained
from blockrepl.storage.history import ReplicaHistory
from blockrepl.storage.retained import Policy, fold_due, raise_floor, read_kept, write_policy
from blockrepl.storage.retention_worker import Order
from blockrepl.units import KIB, MIB, NANOSECONDS_PER_SECOND, format_instant

SECOND = NANOSECONDS_PER_SECOND
LADDER = "all:20s,5s:60s,20s:120s"


@pytest.fixture
def journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Journal]:
    """Records about half a second apart."""

    def tick(self: Journal) -> int:
        self.stamp += self.random.randrange(1, SECOND)
        return self.stamp

    monkeypatch.setattr(Journal, "tick", tick)
    small_segments(monkeypatch, 24 * KIB)
    made = Journal(tmp_path / "home", SIZES)
    write_policy(made.replica.catalog, Policy(ladder=LADDER))
    yield made
    made.close()


@asynccontextmanager
async def committing(journal: Journal) -> AsyncIterator[GroupCommitter]:
    journal.close()
    journal.open()  # seals what is full
    committer = GroupCommitter(journal.replica, MemoryBudget(MIB))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(committer.run)
        yield committer
        nursery.cancel_scope.cancel()


def floor_of(journal: Journal) -> int:
    floor_ns = journal.replica.status().floor_ns
    assert floor_ns is not None
    return floor_ns


def segments_of(journal: Journal) -> list[str]:
    return sorted(path.name for path in (journal.directory / "segments").iterdir())


async def test_a_pass_keeps_what_the_ladder_says_and_folds_the_rest(journal: Journal) -> None:
    journal.run(450)
    journal.gap_and_resync("data")
    journal.run(150)
    before = segments_of(journal)
    async with committing(journal) as committer:
        retention = Retention()
        await retention.run_pass(committer)
        assert retention.groups["web"].problem == ""
        kept, floor_ns = read_kept(journal.replica.catalog), floor_of(journal)
        assert [one.step_ns for one in kept.stretches] == [20 * SECOND, 5 * SECOND]
        assert journal.stamp - floor_ns < 145 * SECOND
        assert len(segments_of(journal)) < len(before)
        assert any("-" in name for name in segments_of(journal))
        shown, refused = check(journal, kept, floor_ns)
        assert shown > 40
        assert refused > 200
        again = segments_of(journal)
        await retention.run_pass(committer)  # nothing is due
        assert (read_kept(journal.replica.catalog), floor_of(journal)) == (kept, floor_ns)
        assert segments_of(journal) == again
    journal.run(120)
    async with committing(journal) as committer:
        await Retention().run_pass(committer)
        assert floor_of(journal) > floor_ns
        assert check(journal, read_kept(journal.replica.catalog), floor_of(journal))[0] > 40


async def test_pins_and_kept_checkpoints_hold_back_just_what_they_need(journal: Journal) -> None:
    # Guards "found" in retention._decide: what a mount or a checkpoint shows would go.
    journal.run(100)
    early = journal.checkpoint("early", kept=True)
    loose = journal.checkpoint("loose")
    journal.run(100)
    used = journal.model.records[-1].stamp
    journal.run(400)
    with (
        ReplicaHistory(journal.directory) as history,
        pins.holding(history, used, used, "a test"),
    ):
        async with committing(journal) as committer:
            await Retention().run_pass(committer)
            kept, floor_ns = read_kept(journal.replica.catalog), floor_of(journal)
            assert floor_ns <= early
            assert kept.before(early) == early
            assert kept.before(used) == used
            names = [row.name for row in journal.replica.catalog.checkpoints()]
            assert names == (["early", "loose"] if kept.before(loose) == loose else ["early"])
            assert check(journal, kept, floor_ns)[0] > 40
            with pytest.raises(PointError):
                pins.hold(history, used + 1, used + 1, "what has been thinned")
            journal.replica.catalog.remove_checkpoint("early")
    async with committing(journal) as committer:
        await Retention().run_pass(committer)
        assert floor_of(journal) > used
        assert check(journal, read_kept(journal.replica.catalog), floor_of(journal))[0] > 40


async def test_nothing_that_is_promised_goes_to_make_room(journal: Journal) -> None:
    # Guards "promised_from_ns" in floor_for_room: history would end with the limit.
    journal.run(300)
    catalog = journal.replica.catalog
    policy = Policy(ladder="all:1h", promised="60s", size_bytes=1)
    write_policy(catalog, policy)
    async with committing(journal) as committer:
        catalog = journal.replica.catalog
        retention = Retention()
        await retention.run_pass(committer)
        floor_ns = floor_of(journal)
        assert journal.stamp - 90 * SECOND < floor_ns <= journal.stamp - 60 * SECOND
        assert "less room than the promised" in retention.groups["web"].problem
        rows = journal.replica.segments()
        told = describe_retention(journal.directory, catalog, rows, journal.stamp, "no room")
        assert (told.level, told.floor_ns) == ("error", floor_ns)
        assert check(journal, read_kept(catalog), floor_ns)[0] > 60


def receiver_of(committer: GroupCommitter) -> Receiver:
    """Just what answers about retention."""
    receiver = object.__new__(Receiver)
    receiver.groups = cast(Any, SimpleNamespace(find=lambda _group: committer))
    receiver._retention = Retention()
    return receiver


async def test_what_is_in_the_open_segment_is_told_of_like_the_rest(journal: Journal) -> None:
    # Guards open_rows in Replica.segments: the catalog's row is as the segment was when it began.
    journal.run(60)
    async with committing(journal) as committer:
        journal.write("root", 0, bytes(4096))
        [row] = [row for row in journal.replica.catalog.segments() if not row.sealed]
        journal.write("root", 4096, os.urandom(16 * KIB))
        told = await receiver_of(committer).retention("web")
        assert told.journal_bytes == journal.replica.status().journal_bytes
        [stretch] = told.stretches
        assert stretch.journal_bytes == told.journal_bytes
        assert row.bytes + 16 * KIB < stretch.journal_bytes
        assert told.bytes_per_day == 24 * told.journal_bytes  # it is younger than an hour


async def test_who_holds_back_much_is_named_once(journal: Journal) -> None:
    # Guards dict.fromkeys in _upcoming: a mount of several instants was named for each.
    journal.run(60)
    async with committing(journal) as committer:
        floor_ns = floor_of(journal)
        with (
            ReplicaHistory(journal.directory) as history,
            pins.holding(history, floor_ns, floor_ns, "mount /mnt"),
            pins.holding(history, floor_ns, floor_ns, "mount /mnt"),
        ):
            told = await receiver_of(committer).retention("web", Policy(ladder="all:1s"))
    assert [one.held_by for one in told.upcoming] == [["mount /mnt"]]
    assert len(told.pins) == 2


@pytest.mark.parametrize(
    ("count", "told"),
    [
        (0, ""),
        (1, "; the checkpoint c0 goes too"),
        (2, "; the checkpoints c0 and c1 go too"),
        (7, "; the checkpoints c0, c1, c2, c3, c4 and 2 more go too"),
    ],
)
async def test_what_a_ladder_lets_go_of_is_told_in_one_sentence(
    journal: Journal, count: int, told: str
) -> None:
    # Guards the wording in check_shortening.
    journal.run(60)
    for number in range(count):
        journal.checkpoint(f"c{number}")
    journal.run(24)
    async with committing(journal) as committer:
        first, last = format_instant(floor_of(journal)), format_instant(journal.stamp - SECOND)
        wanted = Policy(ladder="all:1s")
        with pytest.raises(StateError) as refused:
            await receiver_of(committer).set_retention("web", wanted, shorten=False)
        assert str(refused.value) == (
            "that ladder lets go of history that is there now: "
            f"from {first} to {last} nothing stays{told}"
        )
        thinned = Policy(ladder="all:1s,5s:1h")
        with pytest.raises(StateError, match=r" only a point every 5 s stays(; the|$)"):
            await receiver_of(committer).set_retention("web", thinned, shorten=False)


async def test_a_group_that_takes_nothing_says_why_where_its_room_is_told(journal: Journal) -> None:
    # Guards `explain` in Receiver.retention: `status` alone said that there was no room left.
    async with committing(journal) as committer:
        journal.replica.error = StorageError("no room left", hint="free some", code="full")
        for policy in (None, Policy(ladder="all:1h")):
            told = await receiver_of(committer).retention("web", policy)
            assert (told.level, told.reason) == ("error", "no room left. free some")
        journal.replica.error = None


async def test_a_source_whose_clock_is_ahead_makes_no_history_old(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Guards "now_ns" in _decide: all that is thinned or folded by age would go at once.
    journal.run(60)
    honest = journal.stamp
    journal.stamp += 400 * 86400 * SECOND
    journal.run(1)
    async with committing(journal) as committer:
        monkeypatch.setattr(journal.replica, "now", lambda: honest)
        before = floor_of(journal)
        await Retention().run_pass(committer)
        assert floor_of(journal) == before
        assert check(journal, read_kept(journal.replica.catalog), before)[0] > 40
        # Guards `newest_ns` at the others: `retention set` refused what lets go of nothing.
        receiver = receiver_of(committer)
        policy = Policy(ladder="all:20s,5s:60s,20s:90s")
        told = await receiver.set_retention("web", policy, shorten=False)
        assert told.latest_ns == honest
        assert facts_of(journal.replica).outlook == HistoryOutlook.of(told)


async def test_what_cannot_be_folded_holds_up_no_thinning(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Guards run_pass' "except" around the fold: the journal would grow until the disk is full.
    journal.run(600)
    before = segments_of(journal)
    async with committing(journal) as committer:
        retention = Retention()
        monkeypatch.setattr(retention, "_fold", _Damaged())
        await retention.run_pass(committer)
        assert retention.groups["web"].problem == "a block is damaged"
        assert len(segments_of(journal)) < len(before)


class _Damaged:
    async def __call__(self, *_order: object) -> None:
        raise DamageError("a block is damaged")


async def test_what_lies_before_damage_is_folded_and_the_damage_stays_told(
    journal: Journal,
) -> None:
    # Guards "failure" in Outcome: nothing was folded any more, behind a single frame.
    journal.run(600)
    async with committing(journal) as committer:
        sealed = segments_of(journal)
        path = journal.directory / "segments" / sealed[3]
        flip(path, path.read_bytes().rfind(b"BRF1") + 70)
        retention = Retention()
        for _ in range(2):
            await retention.run_pass(committer)
            assert path.name in retention.groups["web"].problem
            assert not set(segments_of(journal)) & set(sealed[:3])
            assert path.name in segments_of(journal)
            assert fold_due(journal.replica.catalog) == floor_of(journal)


async def test_a_fold_that_a_crash_cut_off_is_done_by_the_next_pass(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal.run(600)
    async with committing(journal) as committer:
        retention = Retention()
        monkeypatch.setattr(retention, "_fold", _Crash())
        with pytest.raises(_Crashed):
            await retention.run_pass(committer)
        floor_ns = floor_of(journal)
        assert fold_due(journal.replica.catalog) == floor_ns
        assert check(journal, read_kept(journal.replica.catalog), floor_ns)[0] > 40
    async with committing(journal) as committer:
        await Retention().run_pass(committer)
        assert fold_due(journal.replica.catalog) is None
        assert check(journal, read_kept(journal.replica.catalog), floor_of(journal))[0] > 40


class _Crashed(BaseException):
    pass


class _Crash:
    async def __call__(self, *_order: object) -> None:
        raise _Crashed


async def test_a_group_whose_source_is_away_keeps_its_history(journal: Journal) -> None:
    journal.run(60)
    async with committing(journal) as committer:
        await Retention().run_pass(committer)  # by our clock, all of it is years from here
        assert check(journal, read_kept(journal.replica.catalog), floor_of(journal))[0] > 20


async def test_what_the_system_refuses_is_a_problem_and_not_the_receivers_end(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Guards OSError in Retention.run_pass: a full disk would end every group's replication.
    def refused(_directory: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "pins.lock")

    journal.run(60)
    async with committing(journal) as committer:
        retention = Retention()
        monkeypatch.setattr(pins, "lock_if_free", refused)
        await retention.run_pass(committer)
        assert "No space left" in retention.groups["web"].problem
        monkeypatch.undo()
        await retention.run_pass(committer)
        assert retention.groups["web"].problem == ""


async def test_a_defect_in_a_pass_is_told_once_with_its_traceback_and_tried_again(
    journal: Journal, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # Guards "except Exception" in Retention.run_pass: it ended the receiver, for all its groups.
    journal.run(60)
    async with committing(journal) as committer:
        retention = Retention()
        with monkeypatch.context() as patched:
            patched.setattr(retention, "_fold", _Defect())
            for _ in range(2):
                await retention.run_pass(committer)
        assert "ZeroDivisionError" in retention.groups["web"].problem
        (record,) = [one for one in caplog.records if "defect" in one.message]
        assert record.exc_info
        await retention.run_pass(committer)
        assert retention.groups["web"].problem == ""


class _Defect:
    async def __call__(self, *_order: object) -> None:
        raise ZeroDivisionError


async def test_the_floor_is_a_point_though_the_gaps_of_two_disks_overlap(
    journal: Journal,
) -> None:
    # Guards union in retention._decide: out of the later gap, into the earlier one.
    journal.run(100)
    for disk in ("root", "data"):
        journal.mark(GapMark(disk=journal.ids[disk], from_ns=journal.tick()))
        journal.replica.commit()
        journal.run(60)
    for disk in ("root", "data"):
        journal.mark(ConsistentMark(disk=journal.ids[disk], at_ns=journal.tick()))
        journal.replica.commit()
        journal.run(60)
    begin, end = (journal.replica.status().gaps[place] for place in (0, 1))
    assert begin.to_ns is not None
    assert end.from_ns < begin.to_ns
    age = (journal.stamp - begin.to_ns) // SECOND - 5  # it lies in the later one
    write_policy(journal.replica.catalog, Policy(ladder=f"all:{age}s"))
    async with committing(journal) as committer:
        await Retention().run_pass(committer)
        floor_ns = floor_of(journal)
        assert floor_ns < begin.from_ns
        with ReplicaHistory(journal.directory) as history:
            assert history.resolve(Point("x", Instant(floor_ns)), journal.stamp).at_ns == floor_ns


async def test_the_floor_is_a_point_though_its_way_out_of_a_gap_leads_into_another(
    journal: Journal,
) -> None:
    # Guards reversed in retention._decide: the instant kept before the later gap was in the other.
    disk = journal.ids["root"]
    journal.run(200)
    for length, until_next in ((180, 20), (220, 10)):
        journal.mark(GapMark(disk=disk, from_ns=journal.tick()))
        journal.replica.commit()
        journal.run(length)
        journal.mark(ConsistentMark(disk=disk, at_ns=journal.tick()))
        journal.replica.commit()
        journal.run(until_next)
    write_policy(journal.replica.catalog, Policy(ladder="all:10s,60s:120s"))
    async with committing(journal) as committer:
        for _ in range(40):
            await Retention().run_pass(committer)
            with ReplicaHistory(journal.directory) as history:
                at = Point("x", Instant(floor_of(journal)))
                assert history.resolve(at, journal.stamp).at_ns == floor_of(journal)
            journal.run(10)
    assert not journal.replica.status().gaps  # it has come past both


async def test_commits_do_not_wait_for_who_holds_the_lock_of_the_pins(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Guards lock_if_free in _decide, which has the committer's turn.
    def waits(_directory: Path) -> None:
        raise AssertionError

    journal.run(450)
    async with committing(journal) as committer:
        retention, before = Retention(), floor_of(journal)
        with monkeypatch.context() as patched, pins.lock(journal.directory):
            patched.setattr(pins, "lock", waits)
            await retention.run_pass(committer)
            assert retention.groups["web"].problem == ""
            assert floor_of(journal) == before
        await retention.run_pass(committer)
        assert floor_of(journal) > before


async def test_commits_go_on_while_old_segments_are_removed(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Guards remove_leftovers in Retention._thin: all commits of the group waited for the disk.
    async def commit() -> None:
        with trio.fail_after(5):
            await committer.perform(lambda: journal.write("root", 0, os.urandom(16 * KIB)))

    def slow(_directory: Path) -> None:
        left.append(retained.leftovers(journal.replica.catalog))
        trio.from_thread.run(commit)

    left: list[set[str]] = []
    journal.run(600)
    async with committing(journal) as committer:
        retention = Retention()
        with monkeypatch.context() as patched:
            patched.setattr(retained, "sync_directory", slow)
            await retention.run_pass(committer)
        assert retention.groups["web"].problem == ""
        assert len(left) > 2  # a fold, and batches
        assert all(left)
        assert not retained.leftovers(journal.replica.catalog)
        assert not set().union(*left) & set(segments_of(journal))
        assert journal.replica.error is None
        assert check(journal, read_kept(journal.replica.catalog), floor_of(journal))[0] > 40


async def test_what_could_not_be_removed_is_removed_by_the_next_pass(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Guards the place of remove_leftovers in Retention._thin: before it looks what is due.
    def refused(_directory: Path) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    journal.run(100)
    write_policy(journal.replica.catalog, Policy(ladder="all:20s"))
    async with committing(journal) as committer:
        retention = Retention()
        with monkeypatch.context() as patched:
            patched.setattr(retained, "sync_directory", refused)
            await retention.run_pass(committer)
        assert "cannot remove" in retention.groups["web"].problem
        catalog = journal.replica.catalog
        assert retained.leftovers(catalog)
        assert fold_due(catalog) is None
        await retention.run_pass(committer)
        assert retention.groups["web"].problem == ""
        assert not retained.leftovers(catalog)


RECEIVER = """
import sys, trio
from pathlib import Path
from blockrepl.services import retention
from blockrepl.storage import retained
from blockrepl.storage.retention_worker import Order
directory, floor_ns, program = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
retention.sys = type("sys", (), {"executable": program})
order = Order(directory=directory, operation="fold", floor_ns=floor_ns)
trio.run(retention.Retention(rate=1.0)._work, order, retained.lock(directory))
"""


def receiver(journal: Journal, program: str, errors: int | None = None) -> subprocess.Popen[bytes]:
    """One that has a fold done, to be killed."""
    raise_floor(journal.replica.catalog, journal.stamp)
    words = [str(journal.directory), str(journal.stamp), program]
    return subprocess.Popen([sys.executable, "-c", RECEIVER, *words], stderr=errors)


def test_a_worker_whose_receiver_died_before_it_had_begun_does_nothing(journal: Journal) -> None:
    # Guards "parent" in main: the worker took the process it had fallen to for its receiver.
    journal.run(100)
    journal.close()
    journal.open()  # seals what is full
    raise_floor(journal.replica.catalog, journal.stamp)
    image = journal.directory / "base" / "root.img"
    before = image.read_bytes()
    with subprocess.Popen(["true"]) as gone:
        gone.wait()
    order = Order(
        directory=journal.directory,
        operation="fold",
        floor_ns=journal.stamp,
        bytes_per_second=1e9,
    )
    for parent, status in ((gone.pid, 1), (os.getpid(), 0)):
        done = subprocess.run(
            [sys.executable, "-m", "blockrepl.storage.retention_worker"],
            input=order.model_copy(update={"parent": parent}).model_dump_json().encode(),
            stdout=subprocess.PIPE,
            check=False,
        )
        assert done.returncode == status
        assert (image.read_bytes() == before, not done.stdout) == (status == 1, status == 1)


def test_a_worker_at_work_ends_with_its_receiver(journal: Journal) -> None:
    # Guards _end_with: it would go on up to its next write, or for good where there is none.
    journal.run(100)
    journal.close()
    journal.open()
    image = journal.directory / "base" / f"{min(SIZES)}.img"  # the first that is folded
    before = image.read_bytes()
    alive, theirs = os.pipe()  # it ends when the last process that has it ends
    with receiver(journal, sys.executable, theirs) as killed:
        os.close(theirs)
        while image.read_bytes() == before:
            assert killed.poll() is None
        killed.kill()
    ended, _, _ = select.select([alive], [], [], 30)
    os.close(alive)
    assert ended


async def test_no_worker_begins_beside_one_that_a_killed_receiver_has_left(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Guards pass_fds in Retention._work: both would write the base, the older one last.
    journal.run(450)
    script, begun, going_on = (journal.home / name for name in ("worker", "begun", "going_on"))
    script.write_text(f"#!/bin/sh\necho > {begun}\nread line < {going_on}\n")
    script.chmod(0o755)
    os.mkfifo(begun)
    os.mkfifo(going_on)
    async with committing(journal) as committer:
        with receiver(journal, str(script)) as killed:
            await trio.to_thread.run_sync(begun.read_text)
            killed.send_signal(signal.SIGKILL)
        before, floor_ns = segments_of(journal), floor_of(journal)
        retention = Retention()
        with monkeypatch.context() as patched:
            patched.setattr(retained, "LOCK_WAIT_SECONDS", 0.0)
            await retention.run_pass(committer)
        assert "still at work" in retention.groups["web"].problem
        assert (segments_of(journal), floor_of(journal)) == (before, floor_ns)
        going_on.write_text("\n")
        await retention.run_pass(committer)
        assert retention.groups["web"].problem == ""
        assert segments_of(journal) != before

"""Every call that the receiver's store makes to change something fails once, in turn; or each read.

Whatever failed: nothing was acknowledged that is not durable, no hole is hidden, the failure is a
clear error, and after a restart, also one behind a power loss, everything acknowledged reads back.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest
from lossy.disk import LossyDisk, lossy_disk
from lossy.nodes import Loss
from store_story import SEGMENT_BYTES, Failure, Source, make_script

from blockrepl import limits
from blockrepl.storage import durable

CALLS_MAX = 1000
SAMPLE_STEP = 67
Fault = int | Literal["short", "read"]
FAULTS: list[Fault] = [errno.EIO, errno.ENOSPC, "short", "read"]
SCRIPT = make_script()
BOOT = [1]


@pytest.fixture(scope="module")
def lossy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LossyDisk]:
    with lossy_disk(tmp_path_factory.mktemp("lossy") / "mount") as disk:
        yield disk


@pytest.fixture(autouse=True)
def _small_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "SEGMENT_BYTES_TARGET", SEGMENT_BYTES)
    monkeypatch.setattr(durable, "this_boot", lambda: BOOT[0])


def bears(
    lossy: LossyDisk, directory: Path, call: int, fault: Fault, *, goes_on: bool = False
) -> bool:
    """A call fails; then a restart, then a power loss. False: there are no so many calls."""
    source = Source(directory, SCRIPT)
    if fault == "read":
        lossy.fail(call, errno.EIO, only="read")
    else:
        lossy.fail(call, fault)
    failure = source.run_and_be_killed(tries=3)
    failed = lossy.state()["failed"]
    lossy.count()
    if failure is not None:
        check_failure(failure, failed, fault)
    if source.acknowledged:
        source.check()
    if failure is not None:
        # What a restarted store says is durable must be: the source forgets it on its word.
        source.run() if goes_on else source.attach()
        source.acknowledged = source.told
        source.kill()
    lossy.lose_power()
    lossy.restore(Loss.DROP)
    BOOT[0] += 1
    if source.acknowledged:
        source.check()
    source.run()
    source.close()
    assert source.check() == len(SCRIPT.numbers)
    return bool(failed)


def check_failure(failure: Failure, failed: str, fault: Fault) -> None:
    assert failed, f"nothing failed, and yet: {failure}"
    assert fault != "short", f"{failed}: {failure}"  # one goes on where it fell short
    assert "\n" not in failure.error
    assert failure.hint or failure.retaining, failure  # which its next pass tries again
    assert failure.stays
    # A file that nothing depends on yet is made anew.
    is_new = failure.error.startswith(("cannot begin segment", "cannot make"))
    is_new |= failure.retaining
    if failed.startswith("fsync") and failed.endswith((".seg", ".img")) and not is_new:
        assert failure.code == "fail-stop", failed


@pytest.mark.parametrize("fault", FAULTS)
def test_a_call_of_the_store_that_fails_costs_nothing_acknowledged(
    lossy: LossyDisk, fault: Fault
) -> None:
    for call in range(1 + FAULTS.index(fault) * 4, CALLS_MAX, SAMPLE_STEP):
        if not bears(lossy, lossy.path / f"{fault}-{call}", call, fault, goes_on=call % 2 == 0):
            break
    else:
        pytest.fail("the story has no end")


@pytest.mark.soak
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("goes_on", [False, True])
def test_every_call_that_fails(lossy: LossyDisk, fault: Fault, goes_on: bool) -> None:
    for call in range(1, CALLS_MAX):
        directory = lossy.path / f"all-{fault}-{goes_on}-{call}"
        if not bears(lossy, directory, call, fault, goes_on=goes_on):
            break
    else:
        pytest.fail("the story has no end")

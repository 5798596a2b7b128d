"""A power loss at any sync of the receiver's store costs nothing that was acknowledged.

Before the sync or right after it, and of what was not synced nothing, something or all is there
afterwards: every frame that was acknowledged is there, every instant offered is what the source
had, and the store goes on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from lossy.disk import LossyDisk, When, lossy_disk
from lossy.nodes import Loss
from store_story import SEGMENT_BYTES, Source, make_script, open_files

from blockrepl import limits
from blockrepl.errors import BlockreplError
from blockrepl.formats.segment import file_name
from blockrepl.storage import durable

SAMPLE_STEP = 9  # of the default run: every ninth sync, and the losses by turns
SYNCS_MAX = 400


@pytest.fixture(scope="module")
def lossy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LossyDisk]:
    with lossy_disk(tmp_path_factory.mktemp("lossy") / "mount") as disk:
        yield disk


@pytest.fixture(autouse=True)
def _small_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "SEGMENT_BYTES_TARGET", SEGMENT_BYTES)
    monkeypatch.setattr(durable, "this_boot", lambda: BOOT[0])


BOOT = [1]


def restore(lossy: LossyDisk, loss: Loss, seed: int) -> None:
    """Power comes back, and the machine boots anew."""
    lossy.restore(loss, seed)
    BOOT[0] += 1


SCRIPT = make_script()


def survives(lossy: LossyDisk, directory: Path, sync: int, when: When, loss: Loss) -> bool:
    """Run into a power loss, and on. False: the story was over before it."""
    source = Source(directory, SCRIPT)
    lossy.lose_power_at(sync, when)
    with contextlib.suppress(BlockreplError):
        source.run()
    is_cut = not lossy.state()["on"]
    source.kill()
    restore(lossy, loss, sync)
    assert open_files(lossy.path) == []
    if source.acknowledged:
        source.check()
    source.run()
    assert source.told == len(SCRIPT.numbers)
    source.close()
    assert source.check() == len(SCRIPT.numbers)
    return is_cut


def test_the_story_is_told_whole(lossy: LossyDisk) -> None:
    lossy.count()
    source = Source(lossy.path / "whole", SCRIPT)
    source.run()
    source.close()
    assert source.check() == len(SCRIPT.numbers)
    found = {path.name for path in (lossy.path / "whole" / "segments").iterdir()}
    assert found == {file_name(3, 1), file_name(4, 0)}  # two are folded, one is written anew
    assert 30 < lossy.state()["syncs"] < SYNCS_MAX


def test_a_power_loss_at_a_sync_of_the_receiver_loses_nothing_acknowledged(
    lossy: LossyDisk,
) -> None:
    losses, whens = list(Loss), list[When](["before", "after"])
    for turn, sync in enumerate(range(1, SYNCS_MAX, SAMPLE_STEP)):
        loss, when = losses[turn % 3], whens[turn // 3 % 2]
        if not survives(lossy, lossy.path / f"sample{turn}", sync, when, loss):
            break
    else:
        pytest.fail("the story has no end")


@pytest.mark.soak
@pytest.mark.parametrize("loss", list(Loss))
@pytest.mark.parametrize("when", ["before", "after"])
def test_every_power_loss(lossy: LossyDisk, when: When, loss: Loss) -> None:
    for sync in range(1, SYNCS_MAX):
        if not survives(lossy, lossy.path / f"{when}-{loss.value}-{sync}", sync, when, loss):
            break
    else:
        pytest.fail("the story has no end")

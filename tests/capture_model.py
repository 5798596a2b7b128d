"""The capture core in this process, on a disk whose power can fail at any instant.

The core's C is compiled with its flushes and writes led through hooks, so that a test knows what is
durable, can act in the middle of a write or a flush, and can take a second's step of the cooling
thread when it wants to. What the world outside the core does (agent, receiver, replica) is played
by the simplest thing that keeps the rules.

==============  ===============================================================================
of              what a power cut may leave
==============  ===============================================================================
image           each sector as of the last flush's beginning, or as it is now
hot map         each bit as it was at any time since the last flush
ring            nothing
replica         what was applied; it is another machine
==============  ===============================================================================
"""

from __future__ import annotations

import ctypes
import errno
import os
import random
import subprocess
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import blockrepl.capture
from blockrepl.formats import hot_map
from blockrepl.formats import ring as layout
from blockrepl.formats.frame import KIND_MASK, RecordKind
from blockrepl.storage.ring import RingReader, create_ring

CORE = Path(blockrepl.capture.__file__).parent
DISK = bytes(range(16))
REGION = 4096
SECTOR = 512
REGIONS = 48
SIZE = REGION * REGIONS
RING_BYTES = 256 * 1024
HOT_MAX = 8
MAP_BYTES = hot_map.HEADER_BYTES + REGIONS // 8

SHIM = r"""
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <unistd.h>
static int (*on_flush)(int);
static void (*on_write)(int);
void model_hooks(int (*flush)(int), void (*write)(int)) { on_flush = flush; on_write = write; }
static int model_flush(int fd)
{
    int rc = on_flush(fd);
    errno = -rc;
    return rc ? -1 : 0;
}
static ssize_t model_write(int fd, const void *data, size_t length, off_t offset)
{
    ssize_t n = pwrite(fd, data, length, offset);
    on_write(fd);
    return n;
}
#define fdatasync model_flush
#define sync_file_range(fd, offset, length, flags) 0
#define pwrite model_write
#include "hot_map.c"
#include "device.c"
void model_step(struct device *d) { hot_map_step(&d->map); }
int model_flush_fd(struct device *d) { return d->map.flush_fd; }
"""
FLUSH_HOOK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int)
WRITE_HOOK = ctypes.CFUNCTYPE(None, ctypes.c_int)


def compile_core(directory: Path, *changes: tuple[str, str, str]) -> Path:
    """The core as a library. ``changes``: file, text, and what to put in its place."""
    for name in ("ring.h", "device.h", "hot_map.h", "hot_map.c", "device.c"):
        text = (CORE / name).read_text()
        for file, old, new in changes:
            if file == name:
                assert text.count(old) == 1, f"{name} has {old!r} {text.count(old)} times"
                text = text.replace(old, new)
        (directory / name).write_text(text)
    (directory / "shim.c").write_text(SHIM)
    library = directory / "core.so"
    command = ["cc", "-O1", "-g", "-w", "-shared", "-fPIC", "-pthread", "-o", str(library)]
    subprocess.run([*command, str(directory / "shim.c")], check=True)
    return library


class World:
    """One disk, its core, its agent and its replica. ``violated`` is empty while all is true."""

    def __init__(self, library: Path, directory: Path, *, cold: bool = False) -> None:
        self._core = ctypes.CDLL(str(library))
        self._core.model_step.argtypes = [ctypes.c_void_p]
        self._core.device_close.argtypes = [ctypes.c_void_p]
        self.image = os.open(directory / "image", os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        os.truncate(self.image, SIZE)
        self.map = os.open(directory / "map", os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        os.pwrite(self.map, hot_map.encode(DISK, SIZE, REGION, hot=not cold), 0)
        self._ring_path = directory / "ring"
        self.during_write: Callable[[], None] = lambda: None
        self.during_flush: Callable[[], None] = lambda: None
        self.flush_fails = False
        self._dying: bool | None = None  # in the flush under way, and whether it fails
        self._has_error = False  # the agent's descriptor has an error to tell
        self._lost = np.zeros(REGIONS, bool)  # dirty when a flush failed: never written since
        self.violated = ""
        self.durable_image = self.content()
        self.may_be_cold = ~self.hot_on_disk()
        self.replica = bytearray(SIZE)
        self._hooks = FLUSH_HOOK(self._on_flush), WRITE_HOOK(self._on_write)
        self._core.model_hooks(*self._hooks)
        self._device = ctypes.c_void_p()
        self.ring: RingReader
        self._make_ring()
        self.open()

    def open(self) -> None:
        descriptor = os.open(self._ring_path, os.O_RDWR)
        words = [ctypes.c_uint64(word) for word in (SIZE, REGION, HOT_MAX)]
        handles = self.image, self.map, descriptor
        rc = self._core.device_open(ctypes.byref(self._device), *handles, *words)
        os.close(descriptor)
        assert rc == 0, os.strerror(-rc)
        self.flush_descriptor = self._core.model_flush_fd(self._device)

    def close(self) -> None:
        self._core.device_close(self._device)

    def end(self) -> None:
        self.close()
        os.close(self.image)
        os.close(self.map)

    def _make_ring(self) -> None:
        self._ring_path.unlink(missing_ok=True)
        create_ring(
            self._ring_path,
            disk=DISK,
            size_bytes=SIZE,
            region_bytes=REGION,
            ring_bytes=RING_BYTES,
            clock_offset=0,
            stale=self.hot_on_disk().astype(np.uint8),
        )
        self.ring = RingReader(self._ring_path, DISK)
        self.cursor = self.applied = 0
        # what is under way: ("records", after, [(offset, data)]) or ("content", region, data)
        self.under_way: deque[tuple[str, int, Any]] = deque()

    # --- looking

    def content(self) -> bytes:
        return os.pread(self.image, SIZE, 0)

    def hot_on_disk(self) -> npt.NDArray[np.bool_]:
        data = os.pread(self.map, MAP_BYTES, 0)
        found = hot_map.decode(data, DISK, SIZE, REGION)
        assert found is not None
        return found.astype(bool)

    def hot_regions(self) -> list[int]:
        found: list[int] = np.flatnonzero(self.hot_on_disk()).tolist()
        return found

    def check(self) -> None:
        """A region that may come back cold is the same in the image, after a cut, and there."""
        now = self.content()
        for region in np.flatnonzero(self.may_be_cold).tolist():
            part = slice(region * REGION, (region + 1) * REGION)
            if self.violated:
                return
            if self.durable_image[part] != now[part]:
                self.violated = f"cold region {region} is not durable"
            elif bytes(self.replica[part]) != now[part]:
                self.violated = f"cold region {region} differs from the replica"

    # --- the hooks

    def _on_write(self, descriptor: int) -> None:
        if descriptor == self.map:
            self.may_be_cold |= ~self.hot_on_disk()
        else:
            self.during_write()
        self.check()

    def _on_flush(self, descriptor: int) -> int:
        if descriptor == self.map:
            self.may_be_cold = ~self.hot_on_disk()
            return 0
        begun = self.content()
        dirty = _regions_that_differ(begun, self.durable_image)
        fails = self.flush_fails
        if self._dying is None:
            self.during_flush()
        else:
            fails, self._flushing = self._dying, self.ring._flushing.copy()
        if fails:
            self._lost |= dirty
            return -errno.EIO
        durable = bytearray(begun)
        for region in np.flatnonzero(self._lost):
            part = slice(region * REGION, (region + 1) * REGION)
            durable[part] = self.durable_image[part]
        self.durable_image = bytes(durable)
        return 0 if self._dying is None else -errno.EIO  # it appends no record

    # --- the guest

    def write(self, offset: int, data: bytes, *, fua: bool = False) -> int:
        size, at = ctypes.c_uint32(len(data)), ctypes.c_uint64(offset)
        return int(self._core.device_write(self._device, data, size, at, int(fua)))

    def trim(self, offset: int, length: int) -> int:
        size, at = ctypes.c_uint32(length), ctypes.c_uint64(offset)
        return int(self._core.device_trim(self._device, size, at, 0))

    def flush(self) -> int:
        return int(self._core.device_flush(self._device))

    def step(self) -> None:
        """A second of the cooling thread."""
        self._core.model_step(self._device)

    # --- agent and receiver

    def take(self, count: int) -> None:
        """Records from the ring, on their way."""
        head = min(self.ring.head(), self.cursor + count)
        if head == self.cursor:
            return
        batch = self.ring.take(self.cursor, head, 1 << 20, count)
        payload, at, changes = memoryview(batch.payload), 0, []
        rows = (batch.columns.offsets, batch.columns.lengths, batch.columns.kinds)
        for offset, length, kind in zip(*(row.tolist() for row in rows), strict=True):
            data = bytes(length)
            if kind & KIND_MASK == RecordKind.WRITE:
                data = bytes(payload[at : at + length])
                at += length
            changes.append((offset, data))
        self.cursor = batch.after
        self.under_way.append(("records", batch.after, changes))

    def release(self) -> None:
        """What is under way is in a spool as well."""
        self.ring.release(self.cursor)

    def sync(self, region: int) -> None:
        """Send a stale region's content, after all that was captured before."""
        while self.cursor < self.ring.head():
            self.take(1 << 20)
        self.ring.begin_sync(region)
        data = os.pread(self.image, REGION, region * REGION)
        self.under_way.append(("content", region, data))

    def apply(self, count: int) -> None:
        for _ in range(min(count, len(self.under_way))):
            kind, number, what = self.under_way.popleft()
            if kind == "content":
                self.replica[number * REGION : (number + 1) * REGION] = what
                self.ring.end_sync(number)
                continue
            for offset, data in what:
                self.replica[offset : offset + len(data)] = data
            self.applied = number

    def ask(self) -> None:
        """What became of the flushes of killed servers. The agent's descriptor is older."""
        if self._has_error:
            self.ring.flush_has_failed()
        else:
            self.ring.set_known_flushes(self.ring.unknown_flushes())

    def note_durable(self) -> None:
        self.ring.set_durable(self.applied)

    def lose_session(self) -> None:
        self.under_way = deque(item for item in self.under_way if item[0] == "records")
        self.ring.restart_syncs()

    def catch_up(self) -> None:
        self.take(1 << 20)
        self.apply(len(self.under_way))
        for region in np.flatnonzero(self.ring.stale).tolist():
            self.sync(region)
        self.apply(len(self.under_way))
        self.note_durable()
        self.release()

    # --- what goes wrong

    def kill(self, offset: int, data: bytes) -> None:
        """kill -9 in the middle of a write to a region that is hot."""
        os.pwrite(self.image, data, offset)
        inflight = self.ring._inflight
        inflight["start"][5], inflight["end"][5] = offset, offset + len(data)
        inflight["generation"][5] |= 1
        self.close()
        self.open()

    def kill_in_flush(self, *, fails: bool) -> None:
        """kill -9 when the system has told the flush's outcome, and the server nobody yet."""
        has_failed = self.ring.flush_failed()
        self._dying = fails
        self.flush()
        self._dying = None
        self._has_error |= fails
        self.ring._words.store(layout.FLUSH_FAILED_AT, int(has_failed))
        self.ring._flushing[:] = self._flushing
        self.close()
        self.open()

    def power_cut(self, choose: random.Random) -> None:
        """The machine goes, and comes back without its ring."""
        self.close()
        now, sectors = self.content(), bytearray()
        for at in range(0, SIZE, SECTOR):
            survivor = now if choose.random() < 0.5 else self.durable_image
            sectors += survivor[at : at + SECTOR]
        os.pwrite(self.image, sectors, 0)
        hot = self.hot_on_disk() & ~(self.may_be_cold & (np.arange(REGIONS) % 2 == 0))
        bits = np.packbits(hot, bitorder="little").tobytes()
        os.pwrite(self.map, bits, hot_map.HEADER_BYTES)
        self.durable_image = bytes(sectors)
        self._lost[:] = False
        self._has_error = False
        self.may_be_cold = ~self.hot_on_disk()
        self._make_ring()
        self.open()
        self.check()


def _regions_that_differ(one: bytes, other: bytes) -> npt.NDArray[np.bool_]:
    a, b = (np.frombuffer(data, np.uint8).reshape(REGIONS, REGION) for data in (one, other))
    found: npt.NDArray[np.bool_] = (a != b).any(axis=1)
    return found


def misuse(world: World, seed: int, actions: int) -> None:
    """A random load with all that can happen, until a violation, or the end."""
    choose = random.Random(seed)

    def data() -> tuple[int, bytes]:
        length = choose.randint(1, 4) * SECTOR
        # half of the load on a few regions, so that there are old and young ones
        regions = REGIONS if choose.random() < 0.5 else 3
        offset = choose.randrange(0, regions * REGION - length)
        return offset, choose.randbytes(length)

    def sometimes(share: float, *what: Callable[[], Any]) -> None:
        if choose.random() < share and not is_nested[0]:
            is_nested[0] = True
            choose.choice(what)()
            is_nested[0] = False

    def guest_write() -> None:
        if choose.random() > 0.05 or is_nested[0]:
            world.write(*data())
            return
        is_nested[0] = True  # it holds its range while it flushes: another write might wait for it
        world.write(*data(), fua=True)
        is_nested[0] = False

    def sync_one() -> None:
        stale = np.flatnonzero(world.ring.stale).tolist()
        if stale:
            world.sync(choose.choice(stale))

    def kill() -> None:
        hot = world.hot_regions()
        if hot:
            world.kill(choose.choice(hot) * REGION, choose.randbytes(SECTOR))

    def trim() -> None:
        world.trim(choose.randrange(REGIONS - 2) * REGION, 2 * REGION)

    is_nested = [False]
    world.during_write = lambda: sometimes(0.3, world.step, world.catch_up, world.note_durable)
    world.during_flush = lambda: sometimes(0.5, guest_write, world.catch_up)
    usual: list[tuple[Callable[[], Any], int]] = [
        (guest_write, 8),
        (trim, 1),
        (world.flush, 1),
        (world.step, 12),
        (lambda: world.take(choose.randint(1, 20)), 4),
        (lambda: world.apply(choose.randint(1, 4)), 6),
        (world.note_durable, 4),
        (world.release, 4),
        (sync_one, 6),
        (world.catch_up, 2),
        (world.ask, 1),
    ]
    rare: list[Callable[[], Any]] = [
        world.lose_session,
        kill,
        lambda: world.kill_in_flush(fails=choose.random() < 0.5),
        lambda: world.power_cut(choose),
        lambda: setattr(world, "flush_fails", choose.random() < 0.3),
    ]
    names, weights = zip(*usual, strict=True)
    for _ in range(actions):
        if choose.random() < 0.01:
            choose.choice(rare)()
        else:
            choose.choices(names, weights)[0]()
        world.check()
        if world.violated:
            return
    world.flush_fails = False
    world.catch_up()
    world.catch_up()
    if bytes(world.replica) != world.content():
        world.violated = "the replica does not converge"

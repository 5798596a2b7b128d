"""A disk's server as a model: capture/device.c in its order, with a pause or a death at each step.

The ring, the hot map and the image are real; what is C and threads there is a task per request
here. Each `_step` is an instant at which others may run, and the server may be killed.

================  ===========================================================================
device.c          here
================  ===========================================================================
change            `Server.change`
make_hot          `_make_hot`
append, mark_gap  `_append`, `_mark_gap`
give_up           `_mark_gap`, after a local write that failed half way
cool              `_cool`
sync_image        `_sync_image`
recover_ring      `_recover_ring`
================  ===========================================================================
"""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass
from typing import Literal

import numpy as np
import trio

from blockrepl import limits
from blockrepl.formats import hot_map
from blockrepl.formats import ring as layout
from blockrepl.formats.frame import FUA, KIND_MASK, RecordKind
from blockrepl.storage._ring import Words
from blockrepl.storage.clock import open_clock
from blockrepl.storage.image import lock_image
from blockrepl.storage.ring import lock_ring, read_geometry
from blockrepl.storage.source import DiskEntry, SourceDisks
from scripts.simulation.files import Machine
from scripts.simulation.model import DiskModel
from scripts.simulation.plan import Request
from scripts.simulation.world import Process, World

COOL_SECONDS = 0.4
PAUSE_CHANCE = 0.2
PAUSE_SECONDS = 0.01


@dataclass(eq=False, slots=True)
class _Request:
    offset: int
    length: int
    slot: int = -1
    state: Literal["waiting", "writing", "recorded"] = "waiting"


class Server:
    """The server of one disk, while it lives."""

    def __init__(
        self, world: World, machine: Machine, disks: SourceDisks, entry: DiskEntry, model: DiskModel
    ) -> None:
        self.process = Process(f"server {entry.name}")
        self.entry = entry
        self._world = world
        self._machine = machine
        self._model = model
        self._clock = open_clock(disks.home.source_directory)
        with disks.lock(entry):
            self._image = lock_image(entry.image)
            path = disks.ensure_ring(entry, self._clock)
            self._writes = lock_ring(path)
        model.server_starts.append(world.glance_ns())
        disks.socket_path(entry).touch()
        self._map = os.open(disks.hot_map_path(entry), os.O_RDWR)
        geometry = read_geometry(path)
        assert geometry is not None
        self.geometry = geometry
        descriptor = os.open(path, os.O_RDWR)
        self._mapping = mmap.mmap(descriptor, geometry.file_bytes)
        os.close(descriptor)
        self._words = Words(self._mapping)
        self._slots = np.frombuffer(
            self._mapping, layout.SLOT, geometry.slot_count, geometry.slots_at
        )
        self._append_lock = trio.StrictFIFOLock()
        self._hot_lock = trio.StrictFIFOLock()
        self._ranges: dict[int, tuple[int, int]] = {}  # slot -> start, end
        self._freed = trio.Event()
        self._flushes: set[int] = set()  # slots
        self._requests: list[_Request] = []
        self._waiting: list[Request] = []
        self._submitted = trio.Event()
        self._flushing = 0
        self._payload_head = 0
        self._last_record = [self.head] * geometry.region_count
        self._last_seconds = [world.clock.now] * geometry.region_count
        self._recover_ring()
        self._hot = self._load_map()
        self.process.on_death.append(self._died)

    async def run(self) -> None:
        """Serve what is submitted, until killed."""
        async with trio.open_nursery() as nursery:
            while True:
                await self._submitted.wait()
                self._submitted = trio.Event()
                while self._waiting:
                    nursery.start_soon(self._serve, self._waiting.pop(0))

    def submit(self, request: Request) -> None:
        self._waiting.append(request)
        self._submitted.set()

    @property
    def is_busy(self) -> bool:
        return bool(self._waiting or self._requests or self._flushing)

    async def _serve(self, request: Request) -> None:
        if request.kind == RecordKind.FLUSH:
            self._flushing += 1
            await self.flush()
            self._flushing -= 1
        else:
            await self.change(
                request.kind, request.offset, request.data, fua=request.fua, fails=request.fails
            )

    # --- words of the ring

    @property
    def head(self) -> int:
        return self._words.load(layout.HEAD_AT)

    def _add(self, at: int, count: int) -> None:
        self._words.store(at, self._words.load(at) + count)

    def _next_stamp(self) -> int:
        last = self._words.load(layout.LAST_STAMP_AT)
        return max(self._clock.now(), last + 1)

    def _regions(self, start: int, end: int) -> range:
        size = self.geometry.region_bytes
        return range(start // size, (end - 1) // size + 1)

    async def _step(self) -> None:
        if self._world.chance.random() < PAUSE_CHANCE:
            await trio.sleep(self._world.chance.uniform(0, PAUSE_SECONDS))
            self.process.check()

    # --- a guest's requests

    async def change(
        self, kind: RecordKind, offset: int, data: bytes, *, fua: bool, fails: bool
    ) -> bool:
        """Write, zero or trim; ``data`` is the range's new content. Whether it succeeded."""
        request = _Request(offset, len(data))
        end = offset + len(data)
        request.slot = await self._take_range(offset, end)
        self._requests.append(request)
        await self._make_hot(offset, end)
        await self._step()
        request.state = "writing"
        half = self._world.chance.randrange(len(data) // 512 + 1) * 512
        self._machine.write(self._image, [data[:half]], offset)
        await self._step()
        if fails:
            async with self._append_lock:
                self.process.check()
                stamp = await self._mark_gap(offset, end)
                self._model.record(stamp, offset, self._content(offset, len(data)))
                request.state = "recorded"
        else:
            self._machine.write(self._image, [data[half:]], offset + half)
            await self._step()
            if fua:
                await self._sync_image()
            payload = data if kind == RecordKind.WRITE else b""
            await self._append(kind | (FUA if fua else 0), offset, data, payload, request)
        await self._step()
        self._requests.remove(request)
        self._release_range(request.slot)
        return not fails

    async def flush(self) -> None:
        before = self.head
        await self._sync_image()
        await self._append(RecordKind.FLUSH, 0, b"", b"", None)
        self._words.store(layout.FLUSHED_AT, before)
        await self._step()
        async with self._hot_lock:
            self.process.check()
            self._cool(before)

    async def _sync_image(self) -> None:
        slot = next(n for n in range(layout.FLUSH_SLOTS) if n not in self._flushes)
        self._flushes.add(slot)
        self._add(layout.FLUSHING_AT + 8 * slot, 1)
        self._machine.sync(self._image)
        await self._step()
        self._add(layout.FLUSHING_AT + 8 * slot, 1)
        self._flushes.remove(slot)

    def _content(self, offset: int, length: int) -> bytes:
        return os.pread(self._image, length, offset)

    # --- ranges

    def _slot_at(self, slot: int) -> int:
        return self.geometry.inflight_at + slot * layout.INFLIGHT.itemsize

    async def _take_range(self, start: int, end: int) -> int:
        while any(first < end and start < last for first, last in self._ranges.values()):
            await self._freed.wait()
            self.process.check()
        slot = next(n for n in range(layout.INFLIGHT_SLOTS) if n not in self._ranges)
        self._ranges[slot] = (start, end)
        self._words.store(self._slot_at(slot), start)
        self._words.store(self._slot_at(slot) + 8, end)
        self._add(self._slot_at(slot) + 16, 1)
        return slot

    def _release_range(self, slot: int) -> None:
        self._add(self._slot_at(slot) + 16, 1)
        del self._ranges[slot]
        self._freed.set()
        self._freed = trio.Event()

    # --- the hot map

    async def _make_hot(self, start: int, end: int) -> None:
        async with self._hot_lock:
            self.process.check()
            cold = [region for region in self._regions(start, end) if not self._hot[region]]
            if not cold:
                return
            bits = self._hot.copy()
            bits[cold] = 1
            self._write_bits(bits)
            await self._step()
            self._machine.sync(self._map)
            self._hot[cold] = 1

    def _write_bits(self, hot: np.ndarray) -> None:
        bits = np.packbits(hot, bitorder="little").tobytes()
        self._machine.write(self._map, [bits], hot_map.HEADER_BYTES)

    def _load_map(self) -> np.ndarray:
        count = self.geometry.region_count
        data = os.pread(self._map, -(-count // 8), hot_map.HEADER_BYTES)
        self._machine.sync(self._map)  # a killed server may have set bits that it did not sync
        return np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little", count=count).copy()

    def _cool(self, flushed: int) -> None:
        """``flushed``: records before it were followed by a local flush."""
        load = self._words.load
        if load(layout.FLUSH_FAILED_AT) or (
            load(layout.FLUSH_UNKNOWN_AT) != load(layout.FLUSH_KNOWN_AT)
        ):
            return
        durable = min(flushed, self._words.load(layout.DURABLE_AT))
        now = self._world.clock.now
        stale, syncing = self.geometry.stale_at, self.geometry.syncing_at
        cooled = self._hot.copy()
        for region in np.nonzero(self._hot)[0].tolist():
            busy = any(region in self._regions(*taken) for taken in self._ranges.values())
            if (
                not self._mapping[stale + region]
                and not self._mapping[syncing + region]
                and self._last_record[region] <= durable
                and now - self._last_seconds[region] >= COOL_SECONDS
                and not busy
            ):
                cooled[region] = 0
        if (cooled != self._hot).any():
            self._world.trace("cool", self.entry.name, *np.nonzero(cooled != self._hot)[0])
            self._hot = cooled
            self._write_bits(cooled)  # not synced: a bit that stays set costs a resync

    # --- the ring

    def _touch(self, start: int, end: int, sequence: int) -> None:
        for region in self._regions(start, end):
            self._last_record[region] = sequence
            self._last_seconds[region] = self._world.clock.now

    async def _mark_gap(self, start: int, end: int) -> int:
        """Under the append lock: give up the record; its regions must be sent again."""
        self._add(layout.BUSY_AT, 1)
        stamp = self._next_stamp()
        self._words.store(layout.LAST_STAMP_AT, stamp)
        await self._step()
        for region in self._regions(start, end):
            self._words.store_byte(self.geometry.stale_at + region, 1)
        self._touch(start, end, self.head + 1)
        self._add(layout.DROPPED_AT, 1)
        if self._words.swap(layout.GAP_FROM_AT, 0, stamp):
            self._model.cause("dropped", stamp, stamp)
        await self._step()
        self._add(layout.BUSY_AT, 1)
        self._world.trace("gap", self.entry.name, stamp, f"[{start}, {end})")
        return stamp

    async def _append(
        self, kind: int, offset: int, data: bytes, payload: bytes, request: _Request | None
    ) -> None:
        async with self._append_lock:
            self.process.check()
            head, tail = self.head, self._words.load(layout.TAIL_AT)
            count = self.geometry.slot_count
            used = 0
            if head != tail:
                used = self._payload_head - int(self._slots["position"][tail % count])
            if head - tail >= count or used + len(payload) > self.geometry.payload_bytes:
                if request is not None:
                    stamp = await self._mark_gap(offset, offset + len(data))
                    self._model.record(stamp, offset, data)
                    request.state = "recorded"
                return
            self._copy(payload)
            await self._step()
            self._add(layout.BUSY_AT, 1)
            stamp = self._next_stamp()
            self._slots[head % count] = (stamp, offset, self._payload_head, len(data), kind)
            self._words.store(layout.LAST_STAMP_AT, stamp)
            self._payload_head += len(payload)
            self._add(layout.WRITTEN_AT, len(payload))
            if data:
                self._touch(offset, offset + len(data), head + 1)
            if self._world.chance.random() < PAUSE_CHANCE / 2:
                await self._step()
            self._words.store(layout.HEAD_AT, head + 1)
            self._model.ring_firsts.setdefault(self.geometry.ring_id, stamp)
            if request is not None:
                self._model.record(stamp, offset, data)
                request.state = "recorded"
            elif kind & KIND_MASK == RecordKind.FLUSH:
                self._model.flushes.append(stamp)
            self._add(layout.BUSY_AT, 1)
            self._world.trace("record", self.entry.name, stamp, f"[{offset}, +{len(data)})", kind)

    def _copy(self, payload: bytes) -> None:
        size, start = self.geometry.payload_bytes, self.geometry.payload_at
        at = self._payload_head % size
        part = min(size - at, len(payload))
        self._mapping[start + at : start + at + part] = payload[:part]
        self._mapping[start : start + len(payload) - part] = payload[part:]

    def _recover_ring(self) -> None:
        """What a killed server left: ranges in flight become stale, a gap begins."""
        words, geometry = self._words, self.geometry
        flushing = [layout.FLUSHING_AT + 8 * slot for slot in range(layout.FLUSH_SLOTS)]
        if any(words.load(at) % 2 for at in flushing):
            self._add(layout.FLUSH_UNKNOWN_AT, 1)
            self._world.trace("flush unknown", self.entry.name)
        for at in flushing:
            self._add(at, words.load(at) % 2)
        busy = words.load(layout.BUSY_AT)
        words.store(layout.BUSY_AT, busy + busy % 2)
        for slot in range(layout.INFLIGHT_SLOTS):
            at = self._slot_at(slot)
            if not words.load(at + 16) % 2:
                continue
            stamp = self._next_stamp()
            words.store(layout.LAST_STAMP_AT, stamp)
            for region in self._regions(words.load(at), words.load(at + 8)):
                words.store_byte(geometry.stale_at + region, 1)
            self._add(layout.DROPPED_AT, 1)
            words.swap(layout.GAP_FROM_AT, 0, stamp)
            self._add(at + 16, 1)
        if self.head:
            last = self._slots[(self.head - 1) % geometry.slot_count]
            is_write = int(last["kind"]) & KIND_MASK == RecordKind.WRITE
            self._payload_head = int(last["position"]) + (int(last["length"]) if is_write else 0)

    # --- the end

    def _died(self) -> None:
        """What was in flight may have reached the disk, without a record."""
        instant = self._clock.now()
        if self._requests:
            began = self._model.ring_firsts.get(self.geometry.ring_id, instant)
            self._model.cause("killed", instant, instant, began)
        for request in self._requests:
            if request.state == "writing":
                content = self._content(request.offset, request.length)
                self._model.uncertain(instant, request.offset, content)
        os.close(self._image)
        os.close(self._map)
        os.close(self._writes)


assert limits.SECTOR_BYTES == 512

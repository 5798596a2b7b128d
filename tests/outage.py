"""A source, a receiver and a guest that remembers: for outages of one or the other.

`Guest` writes through the disk's NBD server and keeps what the disk held at some instants;
`Stage.check` compares them with the replica's views of these instants.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from oracle.nbd_client import Client
from serving import Disk, wait_for

from blockrepl.services.control_client import ControlClient
from blockrepl.storage.clock import open_clock
from blockrepl.storage.home import Home
from blockrepl.units import KIB, MIB, format_instant
from scripts.guest.pair import Pair

GROUP = "g"
BLOCK = 64 * KIB


@dataclass
class Sample:
    at_ns: int
    content: bytes


@dataclass
class Stage:
    """One disk of a group, replicating. ``samples`` are instants with the disk's content."""

    place: Pair
    size_bytes: int = 8 * MIB
    spool_size: str = "1G"
    spool_reserve: str = "0"
    seed: int = 1
    image: Path | None = None  # None: one is made
    agent_options: tuple[str, ...] = ()
    samples: list[Sample] = field(default_factory=list)

    def __post_init__(self) -> None:
        place = self.place
        place.receiver("receiver", "init", quiet=True)
        place.start_receiver()
        place.join()
        self.disk = Disk(place, size_bytes=self.size_bytes, image=self.image, group=GROUP)
        self.start_agent()
        self.disk.start()
        place.wait_replicating(GROUP)
        self.clock = open_clock(self.disk.disks.home.source_directory)
        self.random = random.Random(self.seed)
        self.content = bytearray(self.disk.content())
        self.reader = self.disk.reader()
        self.client = Client(self.disk.socket)

    def close(self) -> None:
        self.client.close()

    def start_agent(self, *options: str) -> None:
        spool = ("--spool-size", self.spool_size, "--spool-reserve", self.spool_reserve)
        self.place.start_agent(*spool, *self.agent_options, *options)

    def start(self, service: str) -> None:
        if service == "agent":
            self.start_agent()
        else:
            self.place.start_receiver()

    def restart_disk(self) -> None:
        self.client.close()
        self.disk.start()
        self.client = Client(self.disk.socket)
        self.reader = self.disk.reader()

    # --- the guest

    def write(self, offset: int, data: bytes) -> None:
        self.client.write(offset, data)
        self.content[offset : offset + len(data)] = data

    def write_anew(self, offset: int, size_bytes: int = BLOCK) -> None:
        self.write(offset, self.random.randbytes(size_bytes))

    def write_some(self, count: int) -> None:
        for _ in range(count):
            self.write_anew(self.random.randrange(self.size_bytes // BLOCK) * BLOCK)

    def sample(self) -> None:
        """What the disk holds now, at a stamp that no later write can have."""
        self.samples.append(Sample(self.clock.now(), bytes(self.content)))
        self.client.write(0, bytes(self.content[:512]))  # a record behind it, of nothing new

    def sample_offline(self) -> None:
        """The same, while no server runs: nothing can be written until the next one does."""
        self.samples.append(Sample(self.clock.now(), bytes(self.content)))

    def wait_ring(self) -> None:
        """Until the agent has made room: for a load that the ring is not to lose."""
        wait_for(lambda: self.reader.fill() < 0.4, "room in the ring")

    # --- what the two sides say

    def source_group(self) -> Any:
        home = Home.open(self.place.source_home)
        [group] = ControlClient(home.agent_socket, "agent").get("/status")["groups"]
        return group

    def group(self) -> Any:
        """The receiver's status of the group: what `blockrepl status` prints, without its start."""
        home = Home.open(self.place.receiver_home)
        groups = ControlClient(home.receiver_socket, "receiver").get("/status")["groups"]
        return next(group for group in groups if group["name"] == GROUP)

    def wait_synced(self) -> None:
        """Everything of now is durable at the receiver, and no gap is open."""
        now = self.clock.now()

        def synced() -> bool:
            group = self.group()
            return group["state"] == "replicating" and int(group["latest_ns"] or 0) >= now

        wait_for(synced, "everything durable at the receiver", 90.0)

    def gaps(self) -> list[tuple[int, int]]:
        return [(gap["from_ns"], gap["to_ns"]) for gap in self.group()["gaps"]]

    def view(self, root: Path, at_ns: int) -> bytes | None:
        """The disk at an instant; None where the point is refused."""
        try:
            return (root / "at" / format_instant(at_ns) / f"{self.disk.name}.img").read_bytes()
        except FileNotFoundError:
            return None

    def check(self, samples: list[Sample] | None = None) -> None:
        """Every sample is reachable and right, and the replica's latest is the image."""
        with self.place.mounted(GROUP) as root:
            for sample in self.samples if samples is None else samples:
                self.check_view(root, sample)
            if samples is None:
                latest = (root / "latest" / f"{self.disk.name}.img").read_bytes()
                assert_same(latest, self.disk.content(), "latest")
                assert_same(bytes(self.content), self.disk.content(), "the image")
                assert self.place.scrub_finds(GROUP) == []

    def check_view(self, root: Path, sample: Sample) -> None:
        name = format_instant(sample.at_ns)
        view = self.view(root, sample.at_ns)
        assert view is not None, f"{name} is refused"
        assert_same(view, sample.content, name)


def assert_same(found: bytes, wanted: bytes, name: str) -> None:
    if found != wanted:
        a, b = (np.frombuffer(data, np.uint8) for data in (found, wanted))
        places = np.flatnonzero(a != b)
        raise AssertionError(f"{name}: {len(places)} bytes differ, the first at {places[0]}")

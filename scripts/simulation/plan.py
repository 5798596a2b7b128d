"""What happens in a run, drawn from its seed: the machines, the guest's requests, the faults."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from blockrepl.formats.frame import RecordKind
from blockrepl.units import KIB
from scripts.simulation.scale import REGION_BYTES

ACTIVE_SECONDS = (0.3, 0.6, 1.6)  # the guest writes and faults begin within one of them
RESTART_SHARE = 0.2  # of the runs, with a receiver that loses its power right behind a restart
OVERRUN_SHARE = 0.5  # of the runs, with a ring that overflows again while its gap's content is sent
FAULT_WEIGHTS = {
    "agent killed": 3,
    "server killed": 3,
    "server stopped": 2,
    "source power": 2,
    "source full": 1,
    "source power behind a gap": 2,
    "receiver killed": 3,
    "receiver power": 3,
    "receiver sync error": 1,
    "receiver full": 1,
    "store restored": 1,
    "link cut": 3,
    "link silent": 2,
    "link half-open": 3,
    "link down": 4,
    "link slow": 1,
    "checkpoint": 4,
}


@dataclass(frozen=True, slots=True)
class Request:
    at: float
    disk: int
    kind: RecordKind
    offset: int = 0
    data: bytes = b""
    fua: bool = False
    fails: bool = False  # the local disk refuses it half way


@dataclass(frozen=True, slots=True)
class Fault:
    at: float
    kind: str
    seconds: float = 0.0  # until it is over
    disk: int = 0
    operations: int = -1  # file operations until the crash; -1: at once
    number: int = 0


@dataclass(slots=True)
class DiskPlan:
    name: str
    size_bytes: int
    ring_bytes: int
    initial: bytes
    served_from: float


@dataclass(slots=True)
class Plan:
    active_seconds: float  # the guest writes and faults begin within them
    disks: list[DiskPlan]
    requests: list[Request]
    faults: list[Fault]
    latency_seconds: float
    spool_bytes: int
    scrub_bytes_per_second: float
    scale: dict[str, object] = field(default_factory=dict)


def make_plan(seed: int) -> Plan:
    chance = random.Random(f"plan {seed}")
    active = chance.choice(ACTIVE_SECONDS)
    disks = [_disk(chance, number) for number in range(1 + (chance.random() < 0.4))]
    scale: dict[str, object] = {
        "SEGMENT_FRAMES_MAX": chance.choice((4, 8, 16, 65536)),
        "WINDOW_FRAMES": chance.choice((2, 4, 16, 256)),
        "SPOOL_FILE_BYTES": chance.choice((2, 16, 64)) * KIB,
        "services.outbox.MEMORY_FRAMES": chance.choice((1, 2, 8, 256)),
        "services.outbox.MEMORY_BYTES": chance.choice((4, 32, 1024)) * KIB,
    }
    plan = Plan(
        active,
        disks,
        _requests(chance, disks, active),
        _faults(chance, len(disks), active),
        chance.choice((0.0002, 0.001, 0.02)),
        chance.choice((1, 16, 64, 1 << 20)) * KIB,
        chance.choice((0.0, 1e6)),
        scale,
    )
    if chance.random() < RESTART_SHARE:
        at, seconds = chance.uniform(0.02, active), chance.choice((0.0, 0.1)) * chance.random()
        plan.faults.append(Fault(at, "receiver power behind a restart", seconds))
    if chance.random() < OVERRUN_SHARE:
        _overrun_again(chance, plan)
    return plan


def _overrun_again(chance: random.Random, plan: Plan) -> None:
    """More than the ring holds, at once, and again and again; meanwhile the agent dies."""
    number = chance.randrange(len(plan.disks))
    disk = plan.disks[number]
    at = chance.uniform(0.1, plan.active_seconds - 0.1)
    plan.faults.append(Fault(at, "agent killed behind an acknowledgement"))
    sector = chance.randrange(disk.size_bytes // 512 - 64)
    for _ in range(chance.randint(3, 8)):
        for _ in range(disk.ring_bytes // (20 * KIB) + 2):
            data = chance.randbytes(20 * KIB)
            offset = (sector + chance.randrange(24)) * 512
            plan.requests.append(Request(at, number, RecordKind.WRITE, offset, data))
        # Up to a round trip later, with its sync.
        at = min(at + (2 * plan.latency_seconds + 0.01) * chance.random(), plan.active_seconds)
    plan.requests.sort(key=lambda request: request.at)


def _disk(chance: random.Random, number: int) -> DiskPlan:
    size_bytes = chance.randint(3, 8) * REGION_BYTES - chance.choice((0, 0, 512, 4 * KIB))
    initial = bytearray(size_bytes)
    for _ in range(chance.randint(0, 6)):
        offset = chance.randrange(size_bytes // 512) * 512
        data = _content(chance, min(chance.choice((512, 4096, 32768)), size_bytes - offset))
        initial[offset : offset + len(data)] = data
    ring_bytes = chance.choice((16, 32, 64, 128)) * KIB
    served_from = chance.choice((0.0, 0.0, chance.uniform(0, 0.5)))
    return DiskPlan(f"disk{number}", size_bytes, ring_bytes, bytes(initial), served_from)


def _content(chance: random.Random, length: int) -> bytes:
    """Bytes whose every sector is of this request alone; some compress."""
    if length <= 4096 or chance.random() < 0.3:
        return chance.randbytes(length)
    return chance.randbytes(512) * (length // 512)


def _requests(chance: random.Random, disks: list[DiskPlan], active: float) -> list[Request]:
    requests: list[Request] = []
    count = chance.randint(10, 40)
    hot = [[chance.randrange(disk.size_bytes // 512) for _ in range(3)] for disk in disks]
    at = chance.uniform(0, 0.3)
    while len(requests) < count:
        at += chance.choice((0.0, 0.0, 0.001, 0.02, 0.1)) * chance.random()
        if at > active:
            at = chance.uniform(0, active)
        number = chance.randrange(len(disks))
        requests.append(_request(chance, at, number, disks[number], hot[number]))
    return sorted(requests, key=lambda request: request.at)


def _request(
    chance: random.Random, at: float, number: int, disk: DiskPlan, hot: list[int]
) -> Request:
    if chance.random() < 0.15:
        return Request(at, number, RecordKind.FLUSH)
    sectors = disk.size_bytes // 512
    near = chance.random() < 0.6
    sector = min(chance.choice(hot) + chance.randrange(8), sectors - 1) if near else -1
    if sector < 0:
        sector = chance.randrange(sectors)
    rest = (sectors - sector) * 512
    if chance.random() < 0.1:
        kind = chance.choice((RecordKind.ZERO, RecordKind.TRIM))
        length = min(chance.randint(1, 64) * 512, rest)
        return Request(at, number, kind, sector * 512, bytes(length))
    length = min(chance.choice((512, 512, 4096, 4096, 8192, 20480)), rest)
    return Request(
        at,
        number,
        RecordKind.WRITE,
        sector * 512,
        _content(chance, length),
        fua=chance.random() < 0.1,
        fails=chance.random() < 0.01,
    )


def _faults(chance: random.Random, disks: int, active: float) -> list[Fault]:
    kinds = chance.choices(
        list(FAULT_WEIGHTS), list(FAULT_WEIGHTS.values()), k=chance.randint(2, 6)
    )
    faults = []
    for number, kind in enumerate(kinds):
        seconds = chance.choice((0.0, 0.01, 0.1, 0.5, 1.0)) * chance.random()
        operations = chance.choice((-1, -1, *range(12)))
        at = chance.uniform(0.02, active)
        faults.append(Fault(at, kind, seconds, chance.randrange(disks), operations, number))
        if kind == "store restored":
            faults.append(Fault(at * chance.random(), "store copied"))
    return sorted(faults, key=lambda fault: fault.at)

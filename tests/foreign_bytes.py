"""Every parser of foreign bytes, each as a function of bytes; for hypothesis and for the fuzzer.

A target takes any bytes and may raise its one error, nothing else. Where a digest stands in the way
it is put right first: a peer that means harm can compute digests too.
"""

from __future__ import annotations

import base64
import contextlib
import json
import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from uuid import UUID

import numpy as np
import trio
import xxhash
from pydantic import ValidationError
from replica_workload import DISK, DISK_BYTES, SOURCE, Agent

from blockrepl import limits
from blockrepl.channel import certificates, enrolment
from blockrepl.channel.framing import HEADER as MESSAGE_HEADER
from blockrepl.channel.framing import MessageStream
from blockrepl.channel.handshake import _ServerNamePeek, enrol_context
from blockrepl.channel.secure_stream import SecureStream
from blockrepl.errors import DamageError, PeerError, StateError, TrustError
from blockrepl.formats import (
    comparison,
    frame,
    hot_map,
    marks,
    merged_run,
    messages,
    ring,
    run,
    segment,
    statistics,
)
from blockrepl.model import timeline
from blockrepl.services import agent_api, receiver_api
from blockrepl.storage import admission, durable
from blockrepl.storage.catalog import DiskRow
from blockrepl.storage.ring import RingReader
from blockrepl.storage.spool import STATE, Spool, SpoolLimits
from blockrepl.units import MIB

GROUP = bytes(range(16))
AGENT = Agent(GROUP)
DISKS = {DISK.bytes: DiskRow(DISK.bytes, "root", DISK_BYTES, SOURCE)}


@dataclass(frozen=True)
class Target:
    parse: Callable[[bytes], object]
    samples: tuple[bytes, ...]  # that are taken
    errors: tuple[type[Exception], ...] = (PeerError,)


# --- frames


def receive_frame(data: bytes) -> object:
    """All that the receiver does with a frame before it is journaled, and a view afterwards."""
    header = frame.decode_header(data)
    whole = memoryview(data)
    admission.check_header(header, whole, group=GROUP, source=SOURCE, disks=DISKS)
    body = whole[frame.HEADER_BYTES :]
    disk = DISKS[header.disk] if header.record_count else None
    admission.check_content(header, body, disk)
    if header.kind == frame.FrameKind.MARK:
        return admission.read_mark(header, body, DISKS)
    payload = frame.decode_payload(header, body)
    assert len(payload) == header.payload_bytes <= limits.FRAME_PAYLOAD_BYTES_MAX
    return payload


def receive_sealed_frame(data: bytes) -> object:
    """The same with all digests, ids and sums put right."""
    fixed = bytearray(data.ljust(frame.HEADER_BYTES, b"\0"))
    fixed[:6] = frame.MAGIC + struct.pack("<H", frame.VERSION)
    fixed[8:56] = GROUP + SOURCE + DISK.bytes
    body_bytes = len(fixed) - frame.HEADER_BYTES
    (count,), (blocks,) = struct.unpack_from("<I", fixed, 68), struct.unpack_from("<I", fixed, 124)
    count, blocks = count % 64, blocks % 16
    struct.pack_into("<I", fixed, 68, count)
    struct.pack_into("<II", fixed, 120, body_bytes, blocks)
    table_bytes = count * frame.RECORD_BYTES + blocks * frame.BLOCK_ENTRY_BYTES
    if table_bytes <= body_bytes:
        _seal_blocks(fixed, count, blocks, frame.HEADER_BYTES + table_bytes)
    start = frame.HEADER_BYTES
    table = xxhash.xxh3_64_intdigest(bytes(fixed[start : start + table_bytes]))
    struct.pack_into("<Q", fixed, 128, table)
    sealed = xxhash.xxh3_64_intdigest(bytes(fixed[: frame.HEADER.size]))
    struct.pack_into("<Q", fixed, frame.HEADER.size, sealed)
    return receive_frame(bytes(fixed))


def _seal_blocks(fixed: bytearray, count: int, blocks: int, at: int) -> None:
    table = frame.HEADER_BYTES + count * frame.RECORD_BYTES
    for block in range(blocks):
        place = table + 8 * blocks + 4 * block
        (stored,) = struct.unpack_from("<I", fixed, place)
        size = min(stored & (frame.RAW_BIT - 1), len(fixed) - at)
        if block == blocks - 1:
            size = len(fixed) - at
        struct.pack_into("<I", fixed, place, size | (stored & frame.RAW_BIT))
        digest = xxhash.xxh3_64_intdigest(bytes(fixed[at : at + size]))
        struct.pack_into("<Q", fixed, table + 8 * block, digest)
        at += size


def _frames() -> tuple[bytes, ...]:
    agent = replace(AGENT)
    made = [
        agent.writes(3),
        agent.records([(agent.stamp + 1, 4096, MIB, 1), (agent.stamp + 2, 0, 0, 3)], b""),
        agent.base(0, b"z" * 200_000),
        agent.checkpoint("tag"),
        agent.gap(),
        agent.consistent(),
    ]
    return tuple(bytes(data) for _, data in made)


# --- messages

MODELS: tuple[tuple[type[messages.Message], messages.Message], ...] = (
    (messages.Hello, messages.Hello(version=1, software="x", instance=3)),
    (
        messages.Welcome,
        messages.Welcome(
            version=1, receiver="v", window_frames=9, window_bytes=limits.WINDOW_BYTES
        ),
    ),
    (
        messages.Attach,
        messages.Attach(
            group="g", disks=[messages.AttachDisk(id=DISK, name="d", size_bytes=DISK_BYTES)]
        ),
    ),
    (
        messages.Attached,
        messages.Attached(
            group="g",
            group_id=UUID(int=1),
            next_number=1,
            watermark=0,
            disks=[
                messages.AttachedDisk(id=DISK, epoch=1, state="gap", ring_id=5, next_sequence=7)
            ],
        ),
    ),
    (messages.Verify, messages.Verify(group="g")),
    (messages.Refusal, messages.Refusal(code="full", error="no room", group="g")),
    (messages.Request, messages.Request(id=1, verb="verify", group="g")),
    (messages.Response, messages.Response(id=1, data={"a": [1]})),
)


def decode_message(data: bytes) -> object:
    """The first byte chooses what it should be."""
    model, _ = MODELS[data[0] % len(MODELS) if data else 0]
    return messages.decode(model, data[1:])


def read_messages(data: bytes) -> object:
    """The stream's reader, over bytes as TLS would hand them on."""

    async def read() -> list[tuple[int, int]]:
        reader = MessageStream(_Bytes(data), messages.RECEIVER_ACCEPTS)  # type: ignore[arg-type]
        seen = []
        while (message := await reader.receive()) is not None:
            seen.append((message[0], len(message[1])))
        return seen

    return trio.run(read)


class _Bytes:
    """What a MessageStream needs of a SecureStream."""

    def __init__(self, data: bytes) -> None:
        self._data = memoryview(data)

    async def receive_some(self, max_bytes: int) -> bytes:
        found, self._data = self._data[:max_bytes], self._data[max_bytes:]
        await trio.lowlevel.checkpoint()
        return bytes(found)

    async def receive_into(self, buffer: memoryview) -> None:
        if len(self._data) < len(buffer):
            raise PeerError("the peer closed the connection early", code="disconnected")
        buffer[:] = await self.receive_some(len(buffer))


assert SecureStream.receive_into.__name__ == _Bytes.receive_into.__name__


# --- who is who


def client_hello(data: bytes) -> object:
    return _ServerNamePeek().feed(data)


def _client_hello() -> bytes:
    import ssl

    outgoing = ssl.MemoryBIO()
    tls = enrol_context().wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname="receiver.blockrepl")
    with contextlib.suppress(ssl.SSLWantReadError):
        tls.do_handshake()
    return outgoing.read()


def _certificates() -> tuple[bytes, bytes, str, str]:
    """Of one source: DER and PEM, its signing request, and the CA that signed it."""
    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import Encoding

    with TemporaryDirectory() as directory:
        authority = certificates.Authority.create(Path(directory) / "authority")
        _, request = certificates.make_key_and_request()
        pem, _ = authority.sign(request, "web1", str(UUID(int=5)))
        der = x509.load_pem_x509_certificate(pem.encode()).public_bytes(Encoding.DER)
        return der, pem.encode(), request, authority.ca_pem


_DER, _PEM, _REQUEST, _CA = _certificates()


def read_request(data: bytes) -> object:
    return certificates._request_key(data.decode("utf-8", "replace"))


def request_of_another_curve() -> bytes:
    """Whole, but for the curve's name: a find of the fuzzer's."""
    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import Encoding

    der = x509.load_pem_x509_csr(_REQUEST.encode()).public_bytes(Encoding.DER)
    changed = der.replace(b"\x2a\x86\x48\xce\x3d\x03\x01\x07", b"\x2a\x86\x44\xce\x3d\x03\x01\x07")
    assert changed != der
    text = base64.encodebytes(changed)
    return b"-----BEGIN CERTIFICATE REQUEST-----\n" + text + b"-----END CERTIFICATE REQUEST-----\n"


def verify_receiver(data: bytes) -> object:
    """A CA that the peer made up, and a leaf of its own."""
    from cryptography.hazmat.primitives import hashes
    from cryptography.x509 import load_pem_x509_certificate

    text = data.decode("utf-8", "replace")
    try:
        fingerprint = load_pem_x509_certificate(data).fingerprint(hashes.SHA256()).hex()
    except ValueError:
        fingerprint = ""
    certificates.verify_receiver(text, fingerprint, _DER)
    return None


ENROLMENT = (enrolment.Offer, enrolment.Application, enrolment.Answer)
TOKEN = enrolment.encode_token(
    enrolment.Token(address="vault:7420", fingerprint="0" * 64, secret="s", expiry_ns=1)
)


def enrolment_message(data: bytes) -> object:
    model = ENROLMENT[data[0] % len(ENROLMENT) if data else 0]
    return enrolment._parse(model, data[1:])


# --- files


def segment_contents(data: bytes) -> object:
    trailer = segment.Trailer(64, len(data), xxhash.xxh3_64_intdigest(data), 0)
    return segment.decode_contents(trailer, data)


def segment_header(data: bytes) -> object:
    fixed = segment.MAGIC + data[8 : segment.HEADER.size].ljust(segment.HEADER.size - 8, b"\0")
    return segment.decode_header(fixed + struct.pack("<Q", xxhash.xxh3_64_intdigest(fixed)))


def index_chunk(data: bytes) -> object:
    count = data[0] if data else 0
    target = run.Run(*(np.zeros(count, kind) for kind in run.COLUMNS.values()))
    run.decode_chunk(data[1:], count, target, 0)
    return target


def merged_contents(data: bytes) -> object:
    return merged_run.decode_contents(data, xxhash.xxh3_64_intdigest(data))


def segment_statistics(data: bytes) -> object:
    """With the segment's making and size, and the digest, put right."""
    if len(data) < statistics.HEADER.size + 8:
        return statistics.decode(data, 1, 2)
    body = data[:8] + struct.pack("<QQ", 1, 2) + data[24:-8]
    found = statistics.decode(body + struct.pack("<Q", xxhash.xxh3_64_intdigest(body)), 1, 2)
    bins = timeline.Bins(timeline.edges(0, 100, 5), [DISK.bytes])
    bins.add(found)
    return bins.changed_bytes()


def _statistics() -> bytes:
    stamps = np.arange(3, dtype=np.uint64)
    lengths, kinds = np.arange(3, dtype=np.uint32), np.arange(3, dtype=np.uint8)
    columns = [frame.Columns(stamps, stamps, lengths, kinds)] * 2
    made = timeline.summarise([0, 1], [1, 3], [DISK.bytes] * 2, [5, 5], columns)
    return statistics.encode(made, 1, 2)


_ENTRY = segment.RunEntry(
    disk=DISK,
    directory_offset=1,
    chunks=1,
    long_chunks=0,
    count=2,
    first_stamp=3,
    last_stamp=4,
    digest=5,
)


def _chunk() -> bytes:
    entries = run.Run(*(np.arange(2, dtype=kind) for kind in run.COLUMNS.values()))
    data, encoder = run.encode_run(entries, 0)
    return data[: encoder.end]


def open_ring(data: bytes) -> object:
    with TemporaryDirectory() as directory:
        path = Path(directory) / "ring"
        path.write_bytes(data)
        geometry = ring.decode_geometry(data)
        reader = RingReader(path, geometry.disk if geometry is not None else bytes(16))
        return reader.head(), reader.fill(), reader.writes_in_flight()


def _ring() -> bytes:
    made = ring.geometry(
        ring_id=1,
        disk=DISK.bytes,
        size_bytes=2 * MIB,
        region_bytes=limits.REGION_BYTES,
        ring_bytes=256 * 1024,
        clock_offset=0,
    )
    data = bytearray(made.file_bytes)
    header = ring.encode_geometry(made)
    data[: len(header)] = header
    data[ring.COMPLETE_AT] = 1
    return bytes(data)


def open_spool_state(data: bytes) -> object:
    return _open_spool(data, {f"{1:020d}.frames": b"".join(_FRAMES[:2])})


def open_spool_files(data: bytes) -> object:
    return _open_spool(_SPOOL_STATE, {f"{1:020d}.frames": data, "notes.frames": b""})


def _open_spool(state: bytes, files: dict[str, bytes]) -> object:
    with TemporaryDirectory() as name:
        directory = Path(name) / "spool"
        directory.mkdir()
        (directory / STATE).write_bytes(state)
        for file, content in files.items():
            (directory / file).write_bytes(content)
        spool = Spool.open(directory, SpoolLimits(1 << 30, 0))
        try:
            while spool.has_unread():
                spool.skip()
        finally:
            spool.close()
        return spool.next_number


_FRAMES = _frames()
_SPOOL_STATE = json.dumps(
    {
        "boot_id": "b",
        "attached": {
            "group": "g",
            "group_id": str(UUID(bytes=GROUP)),
            "next_number": 1,
            "watermark": 0,
            "disks": [],
        },
        "disks": [],
    }
).encode()

TARGETS: dict[str, Target] = {
    "frame": Target(receive_frame, _FRAMES),
    "sealed-frame": Target(receive_sealed_frame, _FRAMES),
    "message": Target(
        decode_message,
        tuple(bytes([i]) + messages.encode(sample) for i, (_, sample) in enumerate(MODELS)),
    ),
    "message-stream": Target(
        read_messages,
        (
            MESSAGE_HEADER.pack(1, messages.MessageType.PING)
            + MESSAGE_HEADER.pack(6, messages.MessageType.DATA)
            + b"hello",
        ),
    ),
    "acknowledgement": Target(messages.decode_ack, (messages.encode_ack(GROUP, 3, 4),)),
    "comparison": Target(
        comparison.decode_compare,
        (
            comparison.encode_compare(
                comparison.Compare(
                    GROUP, DISK.bytes, 1, comparison.Purpose.SCRUB, 5, 0, 100_000, bytes(32)
                )
            ),
        ),
    ),
    "verdict": Target(
        comparison.decode_verdict,
        (comparison.encode_verdict(comparison.Verdict(GROUP, 1, 11, (0, 10))),),
    ),
    "mark": Target(
        marks.decode_mark,
        (
            marks.encode_mark(marks.CheckpointMark(name="a", at_ns=1)),
            marks.encode_mark(marks.GapMark(disk=DISK, from_ns=1)),
            marks.encode_mark(marks.ConsistentMark(disk=DISK, at_ns=1)),
        ),
    ),
    "client-hello": Target(client_hello, (_client_hello(),), (PeerError, TrustError)),
    "certificate": Target(certificates.read_identity, (_DER,), (TrustError,)),
    "certificate-pem": Target(
        lambda data: certificates.read_identity(data.decode("utf-8", "replace")),
        (_PEM,),
        (TrustError,),
    ),
    "certificate-request": Target(read_request, (_REQUEST.encode(),)),
    "receiver-certificate": Target(verify_receiver, (), (TrustError,)),
    "token": Target(
        lambda data: enrolment.decode_token(data.decode("utf-8", "surrogateescape")),
        (TOKEN.encode(),),
        (TrustError,),
    ),
    "enrolment": Target(
        enrolment_message,
        (
            b"\0" + enrolment.Offer(ca_pem="x").model_dump_json().encode(),
            b"\1"
            + enrolment.Application(secret="s", request_pem="x", source_name="a")
            .model_dump_json()
            .encode(),
            b"\2" + enrolment.Answer(error="no").model_dump_json().encode(),
        ),
    ),
    "address": Target(
        lambda data: enrolment.split_address(data.decode("utf-8", "replace")),
        (b"vault:7420", b"[::1]:1"),
    ),
    "segment-header": Target(
        segment_header, (segment.encode_header(segment.SegmentHeader(GROUP, 1, 2)),)
    ),
    "segment-trailer": Target(
        segment.decode_trailer, (segment.encode_trailer(segment.Trailer(1, 2, 3, 4)),), ()
    ),
    "segment-contents": Target(
        segment_contents,
        (
            segment.Contents(
                frames_end=64,
                frame_table_offset=64,
                frame_count=0,
                frame_table_digest=0,
                runs=[_ENTRY],
            )
            .model_dump_json()
            .encode(),
        ),
    ),
    "index-chunk": Target(index_chunk, (b"\2" + _chunk(),)),
    "index-directory": Target(run.decode_directory, (bytes(2 * run.DIRECTORY.itemsize),)),
    "segment-statistics": Target(segment_statistics, (_statistics(),)),
    "merged-header": Target(merged_run.decode_header, (merged_run.encode_header(GROUP),)),
    "merged-contents": Target(
        merged_contents,
        (
            merged_run.MergedContents(name="x.run", first_stamp=3, last_stamp=4, runs=[_ENTRY])
            .model_dump_json()
            .encode(),
        ),
    ),
    "ring": Target(open_ring, (_ring(),), (StateError,)),
    "hot-map": Target(
        lambda data: hot_map.decode(data, DISK.bytes, 5 * MIB, MIB),
        (hot_map.encode(DISK.bytes, 5 * MIB, MIB, hot=True),),
        (),
    ),
    "spool-state": Target(open_spool_state, (_SPOOL_STATE,), (DamageError,)),
    "spool-files": Target(open_spool_files, (b"".join(_FRAMES[:2]),), (DamageError,)),
    "durable-record": Target(
        durable.decode_durable, (durable.encode_durable(durable.Durable(1, 2, 3, 4, 5)),), ()
    ),
    "checkpoint-body": Target(
        receiver_api.NewCheckpoint.model_validate_json,
        (b'{"name": "a", "at_ns": 5, "keep": true}',),
        (ValidationError,),
    ),
    "wanted-checkpoint-body": Target(
        agent_api._WantedCheckpoint.model_validate_json,
        (b'{"name": "a", "keep": true}',),
        (ValidationError,),
    ),
}

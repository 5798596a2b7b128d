"""What crosses the network, as somebody who listens to it would see it.

tcpdump records the loopback while a guest's writes are replicated. The marker that the guest wrote
is found in the journal at the receiver, and nowhere in what was recorded. Two controls keep the
test honest: the same recording does hold a marker that is sent in the clear, and it holds more
bytes than the guest wrote.
"""

from __future__ import annotations

import os
import signal
import socket
import ssl
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from serving import Disk, place, tool, wait_for

from scripts.guest.pair import Pair

__all__ = ["place"]

MARKER = b"the guest's secret, byte for byte: 7c1e"
CONTROL = b"sent in the clear, to prove that the recording works: 91b0"
MIB = 1 << 20


@contextmanager
def recorded(port: int, file: Path) -> Iterator[None]:
    """Record all TCP of a port on the loopback."""
    # 128 MiB of buffer: a busy machine must not lose packets between kernel and tcpdump.
    command = [
        "tcpdump",
        "-i",
        "lo",
        "-s",
        "0",
        "-B",
        "131072",
        "-U",
        "-Z",
        "root",
        "-w",
        str(file),
    ]
    process = subprocess.Popen(
        [*command, "tcp", "port", str(port)], stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stderr is not None
        assert "listening on lo" in "".join(iter_until(process.stderr, "listening on"))
        yield
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=20)


def iter_until(lines: Iterator[str], word: str) -> Iterator[str]:
    for line in lines:
        yield line
        if word in line:
            return


def say_in_the_clear(port: int, file: Path) -> None:
    """Send the control marker to the receiver's port until the recording shows it."""

    def seen() -> bool:
        with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
            connection.sendall(CONTROL)
        return CONTROL in file.read_bytes()

    wait_for(seen, "the control marker in the recording")


def first_answer(port: int, context: ssl.SSLContext) -> bytes:
    """What the receiver says inside TLS; nothing when it ends the handshake.

    In TLS 1.3 the client's part of the handshake ends before the server has judged it, so the
    refusal comes with the first read.
    """
    with socket.create_connection(("127.0.0.1", port), timeout=10) as transport:
        try:
            with context.wrap_socket(transport, server_hostname="receiver.blockrepl") as stream:
                return stream.recv(1)
        except (ssl.SSLError, ConnectionError):
            return b""


@pytest.fixture
def replicating(place: Pair) -> Disk:
    """A receiver, an agent, and a disk of 64 MiB whose first sync is done."""
    place.receiver("receiver", "init", "--name", "wire")
    place.start_receiver()
    place.join()
    disk = Disk(place, size_bytes=64 * MIB)
    place.start_agent()
    disk.start()
    place.wait_replicating(disk.entry.group)
    return disk


@pytest.mark.skipif(os.geteuid() != 0, reason="recording a network needs root")
def test_payload_never_crosses_the_network_in_the_clear(
    place: Pair, replicating: Disk, tmp_path: Path
) -> None:
    file = tmp_path / "recording.pcap"
    content = tmp_path / "content"
    # Amid noise, which is sent and journaled as it is: LZ4 would break the marker up.
    content.write_bytes(os.urandom(MIB) + MARKER + os.urandom(MIB))
    size_bytes = content.stat().st_size
    with recorded(place.port, file):
        tool("qemu-io", "-f", "raw", "-c", f"write -s {content} 0 {size_bytes}", replicating.uri)
        tool("qemu-io", "-f", "raw", "-c", "write -P 0x5a 32M 1M", replicating.uri)
        place.wait_durable(replicating.entry.group)
        say_in_the_clear(place.port, file)
    recording = file.read_bytes()
    segments = (place.receiver_home / "replicas" / replicating.entry.group / "segments").iterdir()
    assert any(MARKER in segment.read_bytes() for segment in segments), "the journal has it"
    assert len(recording) > 2 * MIB, "all of it crossed, whatever it looks like"
    assert MARKER not in recording
    assert MARKER[:16] not in recording


def test_stranger_gets_no_further_than_the_handshake(
    place: Pair, replicating: Disk, tmp_path: Path
) -> None:
    """Without a certificate, and with one of another authority: nothing is answered."""
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subject = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-subj"]
    files: list[str | Path] = ["-keyout", key, "-out", certificate, "-days", "9"]
    tool("openssl", "req", "-x509", *subject, "/CN=source", *files)
    for with_certificate in (False, True):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        if with_certificate:
            context.load_cert_chain(certificate, key)
        assert first_answer(place.port, context) == b""
    before = place.group(replicating.entry.group)
    tool("qemu-io", "-f", "raw", "-c", "write -P 7 0 64k", replicating.uri)
    place.wait_durable(replicating.entry.group)
    assert place.group(replicating.entry.group)["latest_ns"] > before["latest_ns"]

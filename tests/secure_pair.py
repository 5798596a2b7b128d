"""What the channel's tests share: one authority per run, sources of it, and connected pairs."""

from __future__ import annotations

import ssl
import uuid
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import trio
from trio.testing import memory_stream_pair

from blockrepl.channel.certificates import Authority, key_to_pem, make_key_and_request
from blockrepl.channel.handshake import (
    RECEIVER_SERVER_NAME,
    accept,
    client_context,
    connect,
    server_contexts,
)
from blockrepl.channel.secure_stream import SecureStream


@dataclass(frozen=True)
class Receiver:
    """An authority on disk and its doors."""

    directory: Path
    authority: Authority
    contexts: dict[str, ssl.SSLContext]

    def source_context(self, name: str, *, ca_pem: str | None = None) -> ssl.SSLContext:
        """A source with a certificate of this receiver that trusts `ca_pem` (default: its CA)."""
        key, request = make_key_and_request()
        certificate, serial = self.authority.sign(request, name, str(uuid.uuid4()))
        key_path, certificate_path = self.directory / f"{serial}.key", self.directory / serial
        key_path.write_text(key_to_pem(key))
        certificate_path.write_text(certificate)
        return client_context(ca_pem or self.authority.ca_pem, certificate_path, key_path)


@cache
def receiver(directory: Path, number: int = 0) -> Receiver:
    """The run's receivers; different numbers have different authorities."""
    home = Path(mkdtemp(dir=directory))
    authority = Authority.create(home / "authority")
    contexts = server_contexts(
        authority.ca_pem, authority.server_certificate_path, authority.server_key_path
    )
    return Receiver(home, authority, contexts)


async def shake_hands(
    client_side: trio.abc.Stream,
    server_side: trio.abc.Stream,
    server: Receiver,
    client: ssl.SSLContext,
    server_name: str = RECEIVER_SERVER_NAME,
) -> tuple[SecureStream, SecureStream]:
    """Both ends of a secure stream over a connected pair."""
    ends: dict[str, SecureStream] = {}

    async def accept_one() -> None:
        ends["server"] = await accept(server_side, server.contexts)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(accept_one)
        ends["client"] = await connect(client_side, client, server_name)
    return ends["client"], ends["server"]


async def secure_pair(
    server: Receiver, client: ssl.SSLContext
) -> tuple[SecureStream, SecureStream]:
    """A client's and a server's end over memory."""
    client_side, server_side = memory_stream_pair()
    return await shake_hands(client_side, server_side, server, client)

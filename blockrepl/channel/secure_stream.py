"""The secure stream: TLS 1.3 over any Trio stream, driven in large pieces.

Rules:

- The handshake is over before a `SecureStream` exists (see `handshake`), so there are two
  independent directions and nothing else. Each is *whole*, *broken* or *closed*.
- Receiving never sends. The only bytes OpenSSL wants to send on its own are answers to key updates,
  and those are due "prior to sending its next application data" (RFC 8446, 4.6.3): they wait in
  the outgoing buffer for the next send, bounded by `UNSENT_BYTES_MAX`.
- A send that was cut short (cancelled or failed) has left half a TLS record on the wire: the
  sending direction is broken from then on. A receive that was cancelled has lost nothing.
- An end of the transport without close_notify is a truncation: BrokenResourceError, never b"".

Why not trio.SSLStream: it goes through the scheduler once per 16-KiB record (250-480 MB/s on the
machine where this does 700 and more). Here one transport read brings up to 1 MiB, all its records
are decrypted in place into the caller's memory, and one transport write takes all that was
encrypted.
"""

from __future__ import annotations

import contextlib
import operator
import ssl
from collections.abc import Iterable
from types import TracebackType
from typing import Any, cast

import trio
from typing_extensions import Buffer

from blockrepl import limits
from blockrepl.errors import PeerError, TrustError
from blockrepl.units import KIB, MIB

TRANSPORT_BYTES = 1 * MIB  # one read of the transport
JOINED_BYTES_MAX = 16 * KIB  # small buffers share one TLS record, which holds this much
UNSENT_BYTES_MAX = 64 * KIB  # answers to key updates; a flood of them is an attack
RECEIVE_BYTES_DEFAULT = 16 * KIB  # one TLS record

# What OpenSSL calls the alerts that mean "your certificate will not do".
REJECTION_MARKS = ("CERTIFICATE", "UNKNOWN_CA", "ACCESS_DENIED", "ALERT_DECRYPT_ERROR")


class _Exclusive:
    """At most one task inside; the second gets BusyResourceError at once."""

    def __init__(self, doing: str) -> None:
        self.busy = False
        self._doing = doing

    def __enter__(self) -> None:
        if self.busy:
            raise trio.BusyResourceError(f"another task is {self._doing} this stream")
        self.busy = True

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.busy = False


class SecureStream(trio.abc.Stream):
    """One established channel. Made by `handshake.connect` and `handshake.accept` only.

    Attributes:
      server_name: which of the receiver's doors the client asked for.
      received_bytes, sent_bytes: bytes of this channel on the transport, handshake included.
    """

    def __init__(
        self,
        transport: trio.abc.Stream,
        tls: ssl.SSLObject,
        incoming: ssl.MemoryBIO,
        outgoing: ssl.MemoryBIO,
        server_name: str,
    ) -> None:
        self.transport = transport
        self.server_name = server_name
        self.received_bytes = 0
        self.sent_bytes = 0
        self._tls = tls
        self._incoming = incoming
        self._outgoing = outgoing
        self._sending = _Exclusive("sending on")
        self._receiving = _Exclusive("receiving from")
        self._send_broken = False
        self._receive_broken = False
        self._closed = False

    def peer_certificate_der(self) -> bytes | None:
        """The certificate the peer proved to own (DER), None for a client that showed none."""
        return self._tls.getpeercert(binary_form=True)

    # Sending

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Encrypt and send. If cancelled part-way, the sending direction is broken."""
        await self.send_many((data,))

    async def send_many(self, buffers: Iterable[Buffer]) -> None:
        """Encrypt several buffers and send them as one write. Cancellation as in `send_all`.

        They are taken from the iterable, and encrypted to the last byte, at once when it is this
        call's turn: what they are views of may change as soon as something is awaited.
        """
        with self._sending:
            self._check_sending()
            await trio.lowlevel.checkpoint_if_cancelled()
            views = _byte_views(buffers)
            if not views:
                await trio.lowlevel.checkpoint()
                return
            for view in views:
                self._encrypt(view)
            await self._flush()

    async def wait_send_all_might_not_block(self) -> None:
        with self._sending:
            self._check_sending()
            await self.transport.wait_send_all_might_not_block()

    def _encrypt(self, view: memoryview) -> None:
        # A memory BIO takes everything, so one write is the whole write.
        try:
            self._tls.write(view)
        except ssl.SSLError as error:
            self._send_broken = True
            raise trio.BrokenResourceError("the TLS connection is broken") from error

    async def _flush(self) -> None:
        data = self._outgoing.read()
        self._send_broken = True  # until the whole of it is on its way
        await self.transport.send_all(data)
        self._send_broken = False
        self.sent_bytes += len(data)

    # Receiving

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """Up to `max_bytes` of what arrived; b"" after the peer's close_notify.

        Raises TrustError if the peer refused our certificate. Cancellation loses nothing.
        """
        wanted_bytes = RECEIVE_BYTES_DEFAULT if max_bytes is None else operator.index(max_bytes)
        if wanted_bytes < 1:
            raise ValueError("max_bytes must be at least 1")
        buffer = bytearray(min(wanted_bytes, RECEIVE_BYTES_DEFAULT))
        with self._receiving:
            self._check_receiving()
            await trio.lowlevel.checkpoint_if_cancelled()
            count = self._decrypt(buffer)
            if count is not None:
                await trio.lowlevel.cancel_shielded_checkpoint()
            while count is None:
                await self._feed()
                count = self._decrypt(buffer)
            return bytes(memoryview(buffer)[:count])

    async def receive_into(self, buffer: memoryview) -> None:
        """Fill `buffer` (writable bytes) to its end, decrypting straight into it.

        Does not yield where enough has arrived: a message's first bytes were `receive_some`'s.
        Raises PeerError when the stream ends first. If cancelled, part of the buffer is filled and
        those bytes are gone from the stream: give the channel up.
        """
        with self._receiving:
            self._check_receiving()
            await trio.lowlevel.checkpoint_if_cancelled()
            filled_bytes = 0
            while filled_bytes < len(buffer):
                count = self._decrypt(buffer[filled_bytes:])
                if count is None:
                    await self._feed()
                elif count == 0:
                    raise PeerError(
                        f"the peer closed the connection {len(buffer) - filled_bytes} bytes early",
                        code="disconnected",
                    )
                else:
                    filled_bytes += count

    def _decrypt(self, buffer: memoryview | bytearray) -> int | None:
        """Bytes put into `buffer`, 0 after a clean end, None when the transport must be read."""
        try:
            return cast(Any, self._tls).read(len(buffer), buffer)  # type: ignore[no-any-return]
        except ssl.SSLWantReadError:
            return None
        except ssl.SSLZeroReturnError:
            return 0
        except ssl.SSLError as error:
            self._receive_broken = True
            rejection = rejection_of(error, by_source=self._tls.server_side)
            if rejection is not None:
                raise rejection from error
            raise trio.BrokenResourceError(f"the TLS connection is broken: {error}") from error

    async def _feed(self) -> None:
        if self._outgoing.pending > UNSENT_BYTES_MAX:
            self._receive_broken = True
            raise trio.BrokenResourceError("the peer floods the connection with key updates")
        try:
            data = await self.transport.receive_some(TRANSPORT_BYTES)
        except trio.BrokenResourceError:
            self._receive_broken = True
            raise
        if self._closed:
            raise trio.ClosedResourceError("this stream was closed")
        if data:
            self.received_bytes += len(data)
            self._incoming.write(data)
        else:
            self._incoming.write_eof()

    # Closing

    async def aclose(self) -> None:
        """Send close_notify if that is possible within CLOSE_SECONDS, then close the transport.

        If cancelled, the transport is closed all the same, without ceremony.
        """
        if self._closed:
            await trio.lowlevel.checkpoint()
            return
        self._closed = True
        try:
            # Another task inside a send is cut off in the middle of a record: say no more.
            if not self._sending.busy and not self._send_broken:
                # unwrap() wants the peer's close_notify too; that one is not waited for.
                with contextlib.suppress(ssl.SSLError):
                    self._tls.unwrap()
                with trio.move_on_after(limits.CLOSE_SECONDS):
                    with contextlib.suppress(trio.BrokenResourceError):
                        await self.transport.send_all(self._outgoing.read())
        finally:
            await self.transport.aclose()

    def _check_sending(self) -> None:
        if self._closed:
            raise trio.ClosedResourceError("this stream was closed")
        if self._send_broken:
            raise trio.BrokenResourceError("an earlier send failed or was cut short")

    def _check_receiving(self) -> None:
        if self._closed:
            raise trio.ClosedResourceError("this stream was closed")
        if self._receive_broken:
            raise trio.BrokenResourceError("an earlier receive failed")


def rejection_of(error: ssl.SSLError, *, by_source: bool = False) -> TrustError | None:
    """What the peer's alert says about our certificate; None if it is about something else.

    In TLS 1.3 a client has finished its handshake before the server looks at the certificate, so
    this may come with the first read.
    """
    reason = error.reason or ""
    if "ALERT" not in reason or not any(mark in reason for mark in REJECTION_MARKS):
        return None
    why = reason.partition("ALERT_")[2].replace("_", " ").lower()
    if by_source:
        return TrustError(
            f"the source does not accept this receiver's certificate ({why})",
            hint="if the receiver was set up anew, its sources have to join it again",
            code="rejected",
        )
    return TrustError(
        f"the receiver does not accept this source's certificate ({why})",
        hint="join again with a new token: `blockrepl receiver invite` there, "
        "`blockrepl agent join TOKEN` here",
        code="rejected",
    )


def _byte_views(buffers: Iterable[Buffer]) -> list[memoryview]:
    """Flat views of the buffers that are not empty; joined to one if they fit one TLS record."""
    views = []
    for buffer in buffers:
        view = memoryview(buffer)
        if view.nbytes:  # an empty view of other than bytes cannot be cast
            views.append(view.cast("B"))
    if len(views) > 1 and sum(map(len, views)) <= JOINED_BYTES_MAX:
        return [memoryview(b"".join(views))]
    return views

"""Messages over a secure stream.

==========  =====  ==================================================
offset      size   field
==========  =====  ==================================================
0           4      length of what follows, unsigned, little-endian
4           1      type
5           *      payload, length - 1 bytes
==========  =====  ==================================================

Reader: take five bytes; the type must be known and the payload within that type's bound BEFORE any
memory is taken for it; then fill exactly that much. The end of the stream is clean between two
messages and an error inside one.

Times: no first byte for `idle_seconds`, or a last byte later than `message_seconds` after the
first, ends the channel (code "silent"). The peer must also take our messages in `message_seconds`.
A message of more than limits.MESSAGE_PIECE_BYTES has that long for every such piece of it.

The payload's memory is numpy's, uninitialised: the kernel gives its pages only as bytes arrive, so
a peer that announces much and sends little costs little.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Self

import numpy
import trio
from typing_extensions import Buffer

from blockrepl import limits
from blockrepl.channel.prompt_lock import PromptLock
from blockrepl.channel.secure_stream import SecureStream
from blockrepl.errors import PeerError

HEADER = struct.Struct("<IB")  # length of what follows, type
TYPE_BYTES = 1


class MessageStream:
    """Whole messages in both directions. One task may receive; any number may send.

    `payload_bytes_max` maps each type that may arrive to the bound of its payload.
    """

    def __init__(
        self,
        stream: SecureStream,
        payload_bytes_max: Mapping[int, int],
        *,
        idle_seconds: float = limits.IDLE_SECONDS,
        message_seconds: float = limits.MESSAGE_SECONDS,
    ) -> None:
        self.stream = stream
        self._payload_bytes_max = dict(payload_bytes_max)
        self._idle_seconds = idle_seconds
        self._message_seconds = message_seconds
        self._send_lock = PromptLock()
        self._inside_message = False

    async def send(self, message_type: int, *buffers: Buffer) -> None:
        """Send one message whose payload is the buffers one after the other. As `send_taken`."""
        payload_bytes = sum(memoryview(buffer).nbytes for buffer in buffers)
        await self.send_taken(message_type, payload_bytes, lambda: buffers)

    async def send_taken(
        self, message_type: int, payload_bytes: int, take: Callable[[], Iterable[Buffer]]
    ) -> None:
        """Send one message whose payload is the buffers that ``take`` gives, so many bytes in all.

        It is called once, when the channel is free; what it gives is encrypted before anything else
        runs, and need hold no longer.

        Raises PeerError when the peer is gone (code "disconnected") or does not take it in time
        (code "silent"). If cancelled part-way, the channel can send no more.
        """
        if payload_bytes > limits.MESSAGE_BYTES_MAX:
            raise ValueError(f"{payload_bytes} bytes are too many for one message")
        header = HEADER.pack(TYPE_BYTES + payload_bytes, message_type)
        async with self._send_lock:
            pieces = -(-payload_bytes // limits.MESSAGE_PIECE_BYTES)
            seconds = self._message_seconds * max(1, pieces)
            with trio.move_on_after(seconds) as scope:
                try:
                    await self.stream.send_many(_lazily(header, take))
                except trio.BrokenResourceError as error:
                    raise _disconnected() from error
        if scope.cancelled_caught:
            raise PeerError(
                f"silent peer: it took no whole message in {seconds:.0f} s",
                code="silent",
            )

    async def receive(self) -> tuple[int, memoryview] | None:
        """The next message's type and payload (the caller's to keep), None at a clean end.

        Raises PeerError for anything the peer does wrong. If cancelled between messages nothing is
        lost; inside a message the channel can receive no more.
        """
        if self._inside_message:
            raise trio.BrokenResourceError("an earlier receive stopped inside a message")
        try:
            with trio.move_on_after(self._idle_seconds) as scope:
                first = await self.stream.receive_some(HEADER.size)
            if scope.cancelled_caught:
                raise PeerError(
                    f"silent peer: nothing arrived for {self._idle_seconds:.0f} s", code="silent"
                )
            if not first:
                return None
            self._inside_message = True
            with trio.move_on_after(self._message_seconds) as scope:
                message = await self._receive_rest(first, scope)
        except trio.BrokenResourceError as error:
            raise _disconnected() from error
        if scope.cancelled_caught:
            raise PeerError(
                f"slow peer: a message took longer than {self._message_seconds:.0f} s",
                code="silent",
            )
        self._inside_message = False
        return message

    async def _receive_rest(self, first: bytes, scope: trio.CancelScope) -> tuple[int, memoryview]:
        header = bytearray(HEADER.size)
        header[: len(first)] = first
        if len(first) < HEADER.size:
            await self.stream.receive_into(memoryview(header)[len(first) :])
        length_bytes, message_type = HEADER.unpack(header)
        payload_bytes_max = self._payload_bytes_max.get(message_type)
        if payload_bytes_max is None:
            raise PeerError(f"unknown message type {message_type}")
        payload_bytes = length_bytes - TYPE_BYTES
        if not 0 <= payload_bytes <= payload_bytes_max:
            raise PeerError(
                f"a message of type {message_type} with {payload_bytes} bytes of payload, "
                f"where at most {payload_bytes_max} are allowed"
            )
        payload = numpy.empty(payload_bytes, dtype=numpy.uint8).data
        for start in range(0, payload_bytes, limits.MESSAGE_PIECE_BYTES):
            await self.stream.receive_into(payload[start : start + limits.MESSAGE_PIECE_BYTES])
            scope.deadline = trio.current_time() + self._message_seconds
        return message_type, payload

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the channel underneath; see `SecureStream.aclose`."""
        await self.stream.aclose()


def _lazily(header: bytes, take: Callable[[], Iterable[Buffer]]) -> Iterator[Buffer]:
    yield header
    yield from take()


def _disconnected() -> PeerError:
    return PeerError("the connection to the peer was lost", code="disconnected")

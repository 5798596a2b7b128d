"""A small NBD client on a raw socket, sharing no code with the product (doc/proto.md of NBD).

======================  ======================================================================
handshake               newstyle-fixed, NBD_OPT_EXPORT_NAME; replies are simple ones
request (28 bytes)      magic 0x25609513, flags u16, type u16, cookie u64, offset u64, length u32
reply (16 bytes)        magic 0x67446698, error u32, cookie u64; then the data of a read
======================  ======================================================================

`send` and `receive` are apart, so that requests can be pipelined; `read`, `write` and the others
do one request at a time. An error in a reply raises OSError, a lost server ConnectionError.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

READ, WRITE, DISCONNECT, FLUSH, TRIM, WRITE_ZEROES = 0, 1, 2, 3, 4, 6
FUA, NO_HOLE, FAST_ZERO = 1, 2, 16

_GREETING = struct.Struct(">8s8sH")
_OPTION = struct.Struct(">8sII")
_EXPORT = struct.Struct(">QH")
_REQUEST = struct.Struct(">IHHQQI")
_REPLY = struct.Struct(">IIQ")
_REQUEST_MAGIC = 0x25609513
_REPLY_MAGIC = 0x67446698
_FIXED_NEWSTYLE_NO_ZEROES = 3
_EXPORT_NAME = 1


@dataclass
class Client:
    """One connection to an export, by default the one without a name."""

    path: Path
    seconds: float = 60.0
    export: str = ""
    size_bytes: int = 0
    flags: int = 0
    _cookie: int = 0
    _reads: dict[int, int] = field(default_factory=dict)  # cookie -> length of its data

    def __post_init__(self) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self.socket.settimeout(self.seconds)
            self.socket.connect(str(self.path))
            self._shake_hands()
        except BaseException:
            self.socket.close()
            raise

    def _shake_hands(self) -> None:
        magic, option_magic, _ = _GREETING.unpack(self._exactly(_GREETING.size))
        if (magic, option_magic) != (b"NBDMAGIC", b"IHAVEOPT"):
            raise ConnectionError("not an NBD server")
        self.socket.sendall(struct.pack(">I", _FIXED_NEWSTYLE_NO_ZEROES))
        name = self.export.encode()
        self.socket.sendall(_OPTION.pack(b"IHAVEOPT", _EXPORT_NAME, len(name)) + name)
        self.size_bytes, self.flags = _EXPORT.unpack(self._exactly(_EXPORT.size))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Say goodbye if the server still listens."""
        with contextlib.suppress(OSError):
            self.socket.sendall(_REQUEST.pack(_REQUEST_MAGIC, 0, DISCONNECT, 0, 0, 0))
        self.socket.close()

    def vanish(self) -> None:
        """Go away with replies in flight, as a killed client does."""
        self.socket.close()

    def next_cookie(self) -> int:
        """The cookie that the next `send` will give."""
        return self._cookie + 1

    def send(
        self, kind: int, offset: int = 0, length: int = 0, data: bytes = b"", flags: int = 0
    ) -> int:
        """Send one request; its cookie."""
        self._cookie = self.next_cookie()
        if kind == READ:
            self._reads[self._cookie] = length
        header = _REQUEST.pack(
            _REQUEST_MAGIC, flags, kind, self._cookie, offset, len(data) if data else length
        )
        self.socket.sendall(header + data)
        return self._cookie

    def receive(self) -> tuple[int, int, bytes]:
        """The next reply: cookie, error (an errno, 0 for none), data of a read."""
        magic, error, cookie = _REPLY.unpack(self._exactly(_REPLY.size))
        if magic != _REPLY_MAGIC:
            raise ConnectionError(f"a reply begins with {magic:#x}")
        length = self._reads.pop(cookie, 0)
        return cookie, error, self._exactly(length) if length and not error else b""

    def read(self, offset: int, length: int) -> bytes:
        return self._one(self.send(READ, offset, length))

    def write(self, offset: int, data: bytes, flags: int = 0) -> None:
        self._one(self.send(WRITE, offset, data=data, flags=flags))

    def trim(self, offset: int, length: int, flags: int = 0) -> None:
        self._one(self.send(TRIM, offset, length, flags=flags))

    def zero(self, offset: int, length: int, flags: int = 0) -> None:
        self._one(self.send(WRITE_ZEROES, offset, length, flags=flags))

    def flush(self) -> None:
        self._one(self.send(FLUSH))

    def _one(self, cookie: int) -> bytes:
        answered, error, data = self.receive()
        if answered != cookie:
            raise ConnectionError(f"reply {answered} to request {cookie}")
        if error:
            raise OSError(error, os.strerror(error))
        return data

    def _exactly(self, size: int) -> bytes:
        parts = bytearray()
        while len(parts) < size:
            part = self.socket.recv(size - len(parts))
            if not part:
                raise ConnectionError("the server went away")
            parts += part
        return bytes(parts)

"""From a connected transport to a secure stream.

One port, TLS from the first byte, two doors chosen by the name the client asks for (SNI):

==================  ==================================  =====================
server name         who may enter                       what is spoken inside
==================  ==================================  =====================
receiver.blockrepl  a certificate of the receiver's CA  replication
enrol.blockrepl     anyone                              enrolment, only
==================  ==================================  =====================

Anything else (plain text, garbage, another name, silence) is dropped: PeerError, transport closed.

Order: transport connected; ClientHello; TLS 1.3 handshake; the server, having verified the client,
sends GREETING; only then does `connect` return. Without the greeting a client would learn of its
rejected certificate only at some later read, and might lose the alert to a connection reset.

The verification mode cannot be changed once OpenSSL parses the ClientHello, so the name is read
first, by a throw-away TLS object that is fed the same bytes and aborts.

No session tickets: every connection authenticates itself anew, so that a revocation holds at once.
"""

from __future__ import annotations

import contextlib
import ssl
import sys
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

import trio

from blockrepl import limits
from blockrepl.channel.secure_stream import SecureStream, rejection_of
from blockrepl.errors import PeerError, TrustError
from blockrepl.units import KIB

RECEIVER_SERVER_NAME = "receiver.blockrepl"
ENROL_SERVER_NAME = "enrol.blockrepl"

GREETING = b"blockrepl 1\n"
FLIGHT_BYTES = 16 * KIB  # one transport read during the handshake


def client_context(ca_pem: str, certificate_path: Path, key_path: Path) -> ssl.SSLContext:
    """For a source: shows its certificate, accepts only servers of this CA."""
    context = _strict(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT))
    context.load_verify_locations(cadata=ca_pem)
    context.load_cert_chain(certificate_path, key_path)
    return context


def enrol_context() -> ssl.SSLContext:
    """For joining: verifies nothing by itself; the token's fingerprint does (see `enrolment`)."""
    context = _strict(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT))
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def server_contexts(
    ca_pem: str, certificate_path: Path, key_path: Path
) -> dict[str, ssl.SSLContext]:
    """The receiver's two doors, by server name."""
    contexts = {}
    for server_name in (RECEIVER_SERVER_NAME, ENROL_SERVER_NAME):
        context = _strict(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))
        context.load_cert_chain(certificate_path, key_path)
        context.num_tickets = 0
        contexts[server_name] = context
    contexts[RECEIVER_SERVER_NAME].load_verify_locations(cadata=ca_pem)
    contexts[RECEIVER_SERVER_NAME].verify_mode = ssl.CERT_REQUIRED
    return contexts


def _strict(context: ssl.SSLContext) -> ssl.SSLContext:
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    # Python sets this one to make OpenSSL 3 as lax as 1.1: a cut connection would look like its
    # proper end. 1 << 7 is SSL_OP_IGNORE_UNEXPECTED_EOF, which Python 3.11 has no name for.
    context.options &= ~(1 << 7)
    return context


async def connect(
    transport: trio.abc.Stream, context: ssl.SSLContext, server_name: str
) -> SecureStream:
    """Take a connected transport through the client's handshake.

    Raises TrustError when either side refuses the other's certificate, PeerError for anything else
    the peer does wrong, also within HANDSHAKE_SECONDS. The transport is closed if this raises or
    is cancelled.
    """
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = context.wrap_bio(incoming, outgoing, server_hostname=server_name)
    stream = SecureStream(transport, tls, incoming, outgoing, server_name)

    async def shake_hands() -> None:
        await _drive(transport, tls, incoming, outgoing)
        greeting = bytearray(len(GREETING))
        await stream.receive_into(memoryview(greeting))
        if greeting != GREETING:
            raise PeerError(
                "the receiver speaks another version of the protocol",
                hint="install the same blockrepl version on both sides",
                code="version",
            )

    await _guarded(transport, shake_hands)
    return stream


async def accept(
    transport: trio.abc.Stream, contexts: Mapping[str, ssl.SSLContext]
) -> SecureStream:
    """Take an accepted transport through the server's handshake, at the door the client names.

    `contexts` is from `server_contexts`. Raises PeerError or, for a certificate that will not do,
    TrustError, at the latest after HANDSHAKE_SECONDS. The transport is closed if this raises or is
    cancelled.
    """
    streams: list[SecureStream] = []

    async def shake_hands() -> None:
        hello, server_name = await _receive_client_hello(transport)
        context = contexts.get(server_name)
        if context is None:
            raise PeerError(f"the peer asks for a server named {server_name[:64]!r}, not for us")
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        incoming.write(hello)
        tls = context.wrap_bio(incoming, outgoing, server_side=True)
        await _drive(transport, tls, incoming, outgoing)
        streams.append(SecureStream(transport, tls, incoming, outgoing, server_name))
        await streams[0].send_all(GREETING)

    await _guarded(transport, shake_hands)
    return streams[0]


async def _guarded(transport: trio.abc.Stream, shake_hands: Callable[[], Awaitable[None]]) -> None:
    """Run a handshake within its deadline; close the transport whatever goes wrong."""
    try:
        with trio.fail_after(limits.HANDSHAKE_SECONDS):
            await shake_hands()
    except BaseException as error:
        await trio.aclose_forcefully(transport)
        if isinstance(error, trio.TooSlowError):
            raise PeerError(
                f"no complete handshake within {limits.HANDSHAKE_SECONDS:.0f} s: silent peer",
                code="silent",
            ) from None
        if isinstance(error, trio.BrokenResourceError):
            raise PeerError(
                "the peer dropped the connection during the handshake", code="disconnected"
            ) from error
        raise


async def _drive(
    transport: trio.abc.Stream,
    tls: ssl.SSLObject,
    incoming: ssl.MemoryBIO,
    outgoing: ssl.MemoryBIO,
) -> None:
    """Alternate between OpenSSL and the transport until the handshake is done."""
    received_bytes = incoming.pending
    while True:
        try:
            tls.do_handshake()
            wants_more = False
        except ssl.SSLWantReadError:
            wants_more = True
        except ssl.SSLError as error:
            # The alert tells the peer why. It is small: a peer that does not take it loses it.
            with contextlib.suppress(trio.BrokenResourceError):
                await transport.send_all(outgoing.read())
            raise _handshake_failure(error, by_source=tls.server_side) from error
        if outgoing.pending:
            await transport.send_all(outgoing.read())
        if not wants_more:
            return
        data = await transport.receive_some(FLIGHT_BYTES)
        received_bytes += len(data)
        if not data:
            raise PeerError(
                "the peer closed the connection during the handshake", code="disconnected"
            )
        if received_bytes > limits.HANDSHAKE_BYTES_MAX:
            raise PeerError(f"a handshake of more than {limits.HANDSHAKE_BYTES_MAX} bytes")
        incoming.write(data)


def _handshake_failure(error: ssl.SSLError, *, by_source: bool) -> PeerError | TrustError:
    if isinstance(error, ssl.SSLCertVerificationError):
        return TrustError(
            f"the peer's certificate is not acceptable: {error.verify_message}",
            hint="check the address; if the receiver was set up anew, join it again",
            code="certificate",
        )
    if error.reason == "PEER_DID_NOT_RETURN_A_CERTIFICATE":
        return TrustError("the peer shows no certificate", code="certificate")
    reason = (error.reason or "unknown").replace("_", " ").lower()
    return rejection_of(error, by_source=by_source) or PeerError(
        f"the peer does not speak our TLS 1.3 ({reason})",
        hint="check that the address is that of a blockrepl receiver",
    )


async def _receive_client_hello(transport: trio.abc.Stream) -> tuple[bytes, str]:
    """All bytes up to a complete ClientHello (and perhaps beyond it), and the name it asks for."""
    hello = bytearray()
    peek = _ServerNamePeek()
    while True:
        data = await transport.receive_some(limits.CLIENT_HELLO_BYTES_MAX - len(hello) + 1)
        if not data:
            raise PeerError("the peer closed the connection before it said hello")
        hello += data
        if len(hello) > limits.CLIENT_HELLO_BYTES_MAX:
            raise PeerError(f"a first flight of more than {limits.CLIENT_HELLO_BYTES_MAX} bytes")
        server_name = peek.feed(data)
        if server_name is not None:
            return bytes(hello), server_name


class _Peeked(ssl.SSLObject):
    """A TLS object that notes the name it is asked for ("" for none)."""

    asked_name: str | None = None


def _note_name(tls: ssl.SSLObject, server_name: str | None, context: ssl.SSLContext) -> int:
    assert isinstance(tls, _Peeked)
    tls.asked_name = (server_name or "").lower()
    return ssl.ALERT_DESCRIPTION_UNRECOGNIZED_NAME


def _peek_context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.sslobject_class = _Peeked
    context.sni_callback = _note_name
    return context


# One for all: a context takes 60 KB, and one of each stranger's own would wait for the collector.
_PEEK_CONTEXT = _peek_context()


class _ServerNamePeek:
    """Reads the server name from a ClientHello with OpenSSL's own parser, then aborts."""

    def __init__(self) -> None:
        self._incoming = ssl.MemoryBIO()
        self._tls = _PEEK_CONTEXT.wrap_bio(self._incoming, ssl.MemoryBIO(), server_side=True)

    @property
    def _server_name(self) -> str | None:
        assert isinstance(self._tls, _Peeked)
        return self._tls.asked_name

    def feed(self, data: bytes | bytearray) -> str | None:
        """The name ("" if none was given), or None while the hello is incomplete."""
        self._incoming.write(data)
        told, sys.unraisablehook = sys.unraisablehook, _ignore
        try:
            self._tls.do_handshake()
        except ssl.SSLWantReadError:
            return None
        except ssl.SSLError as error:
            if self._server_name is None:
                raise _handshake_failure(error, by_source=True) from error
        finally:
            sys.unraisablehook = told
        return self._server_name


def _ignore(unraisable: object) -> None:
    """A name that is not ASCII: Python prints a traceback for it, then the handshake fails."""

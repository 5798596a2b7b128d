"""Enrolment: how a source gets a certificate, with a one-time token and without sending a key.

The token: ``br1.`` and the URL-safe base64 (no padding) of compact JSON::

    {"address": "HOST:PORT", "fingerprint": SHA-256 of the CA's DER in hexadecimal,
     "secret": the invitation's, "expiry_ns": when it stops being good}

The conversation, at the receiver's enrolment door (server name enrol.blockrepl), JSON messages:

====  ==========  =============================================================================
step  from        message
====  ==========  =============================================================================
1     receiver    Offer: the CA's certificate
2     source      checks it: fingerprint as in the token, and the certificate that the receiver
                  proved to own in the handshake was issued by it, for a receiver.
                  Only then: Application: secret, signing request, wished name
3     receiver    signs; uses the invitation up and adds the source, in one transaction;
                  Answer: the certificate, or why not
4     source      checks the certificate, writes its identity, whole or not at all
====  ==========  =============================================================================

An identity's directory: ``key.pem`` (never leaves it), ``cert.pem``, ``ca.pem``, ``receiver.json``.
"""

from __future__ import annotations

import base64
import binascii
import json
import ssl
import uuid
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Protocol, TypeVar

import trio
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from blockrepl import limits
from blockrepl.channel import certificates
from blockrepl.channel.certificates import Authority
from blockrepl.channel.framing import MessageStream
from blockrepl.channel.handshake import (
    ENROL_SERVER_NAME,
    client_context,
    connect,
    enrol_context,
)
from blockrepl.channel.secure_stream import SecureStream
from blockrepl.channel.whole_directory import create_directory
from blockrepl.errors import BlockreplError, PeerError, StateError, StorageError, TrustError
from blockrepl.units import MIB

TOKEN_PREFIX = "br1."
JSON_MESSAGE = 32  # formats.messages leaves 32 to 63 to enrolment
UNSENT_BYTES = 1 * MIB  # in the kernel: with Trio's 16 KiB a frame takes 5 visits, for 0.5 ms more
ADDRESS_CHARACTERS_MAX = 300  # a host's name has 253 at the most
PORT_DIGITS_MAX = 5
TOKEN_HINT = "paste the whole token as `blockrepl receiver invite` printed it"

KEY, CERTIFICATE, CA, RECEIVER = "key.pem", "cert.pem", "ca.pem", "receiver.json"


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Token(_Model):
    """What an invitation tells a source. `address` is HOST:PORT, [HOST]:PORT for IPv6."""

    address: Annotated[str, Field(max_length=ADDRESS_CHARACTERS_MAX)]
    fingerprint: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    secret: Annotated[str, Field(min_length=1, max_length=200)]
    expiry_ns: Annotated[int, Field(ge=0, lt=1 << 63)]


class Offer(_Model):
    ca_pem: str


class Application(_Model):
    secret: Annotated[str, Field(max_length=200)]
    request_pem: str
    source_name: Annotated[str, Field(max_length=200)]


class Answer(_Model):
    """Either the certificate, or an error with its code and hint."""

    certificate_pem: str = ""
    error: str = ""
    code: str = ""
    hint: str = ""


class ReceiverFile(_Model):
    """receiver.json: where the receiver is. The user may change the address."""

    address: str


class Redeem(Protocol):
    """Uses an invitation up and adds the source, or raises BlockreplError and does neither.

    Called in a worker thread. `now` is in ns since 1970.
    """

    def __call__(
        self, secret: str, now: int, *, name: str, source_id: str, serial: str
    ) -> object: ...


class Clock(Protocol):
    """Nanoseconds since 1970."""

    def __call__(self) -> int: ...


@dataclass(frozen=True)
class Identity:
    """Who this source is, and to whom: what `join` wrote and `load_identity` reads."""

    name: str
    source_id: str
    serial: str
    address: str
    directory: Path

    def context(self) -> ssl.SSLContext:
        """For `connect` to the receiver's replication door. Raises StorageError."""
        try:
            ca_pem = (self.directory / CA).read_text()
            return client_context(ca_pem, self.directory / CERTIFICATE, self.directory / KEY)
        except (ssl.SSLError, ValueError) as error:
            # OpenSSL names no file, and says no more than "PEM lib" of what is in it.
            raise self._unusable(f"{KEY}, {CERTIFICATE} or {CA} is damaged") from error
        except OSError as error:
            raise self._unusable(error.strerror or str(error)) from error

    def _unusable(self, why: str) -> StorageError:
        return StorageError(
            f"the identity in {self.directory} cannot be used: {why}",
            hint="if its files are lost, join again with a new token, in a new home",
        )


def encode_token(token: Token) -> str:
    text = base64.urlsafe_b64encode(token.model_dump_json().encode()).decode()
    return TOKEN_PREFIX + text.rstrip("=")


def decode_token(text: str) -> Token:
    """Raises TrustError for anything that `encode_token` did not make."""
    try:
        text = text.strip()
        if len(text) > limits.TOKEN_CHARACTERS_MAX or not text.startswith(TOKEN_PREFIX):
            raise ValueError("no token")
        body = text.removeprefix(TOKEN_PREFIX).encode("ascii")
        padding = b"=" * (-len(body) % 4)
        decoded = base64.b64decode(body + padding, altchars=b"-_", validate=True)
        token = Token.model_validate(json.loads(decoded))
        split_address(token.address)
    except (ValueError, RecursionError, binascii.Error, PeerError) as error:
        raise TrustError("this is not a whole token", hint=TOKEN_HINT, code="token") from error
    return token


def split_address(address: str) -> tuple[str, int]:
    """HOST:PORT or [HOST]:PORT. Raises PeerError."""
    host, colon, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not (colon and host and is_port(port) and int(port)):
        raise PeerError(f"{address[:300]!r} is not an address", hint="write HOST:PORT")
    return host, int(port)


def is_port(text: str) -> bool:
    """Whether it is a port's number, 0 included, of whatever length it is."""
    is_number = len(text) <= PORT_DIGITS_MAX and text.isascii() and text.isdecimal()
    return is_number and int(text) < 1 << 16


async def join(token_text: str, source_name: str, directory: Path) -> Identity:
    """Get a certificate and write the identity to `directory`, which must not exist or be empty.

    Raises TrustError, PeerError or StateError; then, and if cancelled, nothing is left behind. If
    the answer is lost, the invitation is used up all the same.
    """
    token = decode_token(token_text)
    certificates.check_name(source_name)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise _already_joined(directory)
    transport = await open_transport(token.address)
    stream = await connect(transport, enrol_context(), ENROL_SERVER_NAME)
    async with _messages(stream) as messages:
        offer = _parse(Offer, await _receive(messages))
        leaf = stream.peer_certificate_der() or b""
        certificates.verify_receiver(offer.ca_pem, token.fingerprint, leaf)
        key, request_pem = certificates.make_key_and_request()
        application = Application(
            secret=token.secret, request_pem=request_pem, source_name=source_name
        )
        await _send(messages, application)
        answer = _parse(Answer, await _receive(messages))
    if answer.error:
        raise TrustError(answer.error, hint=answer.hint, code=answer.code or None)
    identity = certificates.verify_own_certificate(answer.certificate_pem, offer.ca_pem, key)
    if identity.name != source_name:
        raise TrustError("the receiver answered with a certificate for another name")
    files = {
        KEY: certificates.key_to_pem(key),
        CERTIFICATE: answer.certificate_pem,
        CA: offer.ca_pem,
        RECEIVER: ReceiverFile(address=token.address).model_dump_json(indent=2) + "\n",
    }
    if not create_directory(directory, files):
        raise _already_joined(directory)
    return load_identity(directory)


def load_identity(directory: Path) -> Identity:
    """Raises StateError if this home has not joined, StorageError if its files are unreadable."""
    try:
        receiver = ReceiverFile.model_validate_json((directory / RECEIVER).read_bytes())
        identity = certificates.read_identity((directory / CERTIFICATE).read_text())
    except FileNotFoundError as error:
        raise StateError(
            "this source has not joined a receiver",
            hint="run `blockrepl receiver invite` there and `blockrepl agent join TOKEN` here",
            code="not-joined",
        ) from error
    except (OSError, ValueError, TrustError) as error:
        raise StorageError(f"the identity in {directory} is unreadable: {error}") from error
    return Identity(identity.name, identity.source_id, identity.serial, receiver.address, directory)


async def serve_enrolment(
    stream: SecureStream, authority: Authority, redeem: Redeem, clock: Clock
) -> None:
    """The receiver's side, for a stream that came in by the enrolment door. Closes the stream.

    A refusal is told to the peer, and is no error here. Raises PeerError if the peer misbehaves.
    """
    async with _messages(stream) as messages:
        await _send(messages, Offer(ca_pem=authority.ca_pem))
        application = _parse(Application, await _receive(messages))
        try:
            answer = await _admit(application, authority, redeem, clock)
        except BlockreplError as error:
            answer = Answer(error=str(error), code=error.code, hint=error.hint)
        await _send(messages, answer)


async def _admit(
    application: Application, authority: Authority, redeem: Redeem, clock: Clock
) -> Answer:
    # Signed before the invitation is used up: what fails here costs the user no token. A
    # certificate that is not in the list of sources afterwards is worth nothing.
    source_id = str(uuid.uuid4())
    name = application.source_name
    certificate_pem, serial = authority.sign(application.request_pem, name, source_id)
    use_up = partial(
        redeem, application.secret, clock(), name=name, source_id=source_id, serial=serial
    )
    await trio.to_thread.run_sync(use_up)
    return Answer(certificate_pem=certificate_pem)


async def open_transport(address: str) -> trio.SocketStream:
    """Connect to HOST:PORT within HANDSHAKE_SECONDS; PeerError (code "unreachable") if not."""
    host, port = split_address(address)
    why = f"no answer in {limits.HANDSHAKE_SECONDS:.0f} s"
    try:
        with trio.move_on_after(limits.HANDSHAKE_SECONDS):
            transport = await trio.open_tcp_stream(host, port)
            transport.setsockopt(
                trio.socket.IPPROTO_TCP, trio.socket.TCP_NOTSENT_LOWAT, UNSENT_BYTES
            )
            return transport
    except (OSError, UnicodeError) as error:
        cause = error.__cause__
        if isinstance(cause, BaseExceptionGroup):
            cause = cause.exceptions[0]
        why = str(getattr(cause, "strerror", None) or error)
    raise PeerError(
        f"cannot reach the receiver at {address}: {why}",
        hint="check that `blockrepl receiver run` runs there and that no firewall is between",
        code="unreachable",
    )


def _messages(stream: SecureStream) -> MessageStream:
    # Nobody has anything to think about here: strangers get the short deadline.
    return MessageStream(
        stream,
        {JSON_MESSAGE: limits.ENROLMENT_MESSAGE_BYTES_MAX},
        idle_seconds=limits.HANDSHAKE_SECONDS,
        message_seconds=limits.HANDSHAKE_SECONDS,
    )


async def _send(messages: MessageStream, message: _Model) -> None:
    await messages.send(JSON_MESSAGE, message.model_dump_json().encode())


async def _receive(messages: MessageStream) -> bytes:
    received = await messages.receive()
    if received is None:
        raise PeerError("the peer ended the enrolment early", code="disconnected")
    return bytes(received[1])


_M = TypeVar("_M", bound=_Model)


def _parse(model: type[_M], payload: bytes) -> _M:
    try:
        return model.model_validate_json(payload)
    except ValidationError as error:
        raise PeerError(f"not a well-formed {model.__name__} message of the enrolment") from error


def _already_joined(directory: Path) -> StateError:
    return StateError(
        f"this source has already joined a receiver ({directory} is not empty)",
        hint="to join another one, use another --home, or remove that directory first",
        code="joined",
    )

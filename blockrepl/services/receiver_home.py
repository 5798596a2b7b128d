"""The receiver's part of a home: its name and authority, its trust, where it listens.

=============================  =======================================================
path                           content
=============================  =======================================================
receiver/authority/            the CA and the receiver's certificate (certificates.py)
receiver/trust.sqlite          invitations and sources (storage/trust.py)
receiver/receiver.json         Configuration
run/receiver.lock              held by the running receiver
run/receiver.sock              its control API
=============================  =======================================================
"""

from __future__ import annotations

import re
import socket
import time
from contextlib import closing

from pydantic import BaseModel, ValidationError

from blockrepl import limits
from blockrepl.channel.certificates import Authority
from blockrepl.channel.enrolment import ADDRESS_CHARACTERS_MAX, Token, encode_token, is_port
from blockrepl.errors import StateError, UsageError
from blockrepl.formats.marks import NameField
from blockrepl.storage.home import Home, check_name, make_directory, write_atomically
from blockrepl.storage.trust import FILE_NAME as TRUST_NAME
from blockrepl.storage.trust import TrustStore
from blockrepl.units import NANOSECONDS_PER_SECOND

DEFAULT_HOST = "0.0.0.0"
ANY_HOSTS = {"0.0.0.0", "::", ""}


class Configuration(BaseModel):
    """``listen`` is the last address that `receiver run` was told, HOST:PORT; its port never 0."""

    name: NameField
    listen: str = f"{DEFAULT_HOST}:{limits.RECEIVER_PORT}"


def host_name() -> str:
    """This host's name, as far as it can be one of ours."""
    name = re.sub(r"[^a-z0-9._-]", "-", socket.gethostname().lower()).strip("-._")[:63]
    return name if re.fullmatch(limits.NAME_PATTERN, name) else "receiver"


def initialise(home: Home, name: str | None) -> Configuration:
    """Make the receiver's part of a home. StateError when there is one already."""
    configuration = Configuration(name=check_name(name or host_name(), "receiver"))
    path = home.receiver_directory / "receiver.json"
    if path.exists():
        raise StateError(
            f"there is a receiver in {home.path} already",
            hint="start it with `blockrepl receiver run`, or use another --home",
            code="initialised",
        )
    make_directory(home.receiver_directory, 0o700)
    authority = home.receiver_directory / "authority"
    if not authority.exists():
        Authority.create(authority)
    open_trust(home).close()
    _write(home, configuration)
    return configuration


def read_configuration(home: Home) -> Configuration:
    """StateError when the home has no receiver."""
    path = home.receiver_directory / "receiver.json"
    try:
        return Configuration.model_validate_json(path.read_bytes())
    except FileNotFoundError as error:
        hint = "run `blockrepl receiver init` first, or name the right home with --home"
        if home.source_directory.exists():
            hint = (
                "this home is a source's: run the command on the receiver's host, or name its home "
                "with --home"
            )
        raise StateError(
            f"there is no receiver in {home.path}",
            hint=hint,
            code="no-receiver",
        ) from error
    except ValidationError as error:
        raise StateError(f"{path} is not a receiver's configuration") from error


def remember_listen(home: Home, listen: str) -> None:
    """Keep the address for the next `run` and for invitations."""
    configuration = read_configuration(home)
    if configuration.listen != listen:
        _write(home, configuration.model_copy(update={"listen": listen}))


def _write(home: Home, configuration: Configuration) -> None:
    data = configuration.model_dump_json(indent=2).encode() + b"\n"
    write_atomically(home.receiver_directory / "receiver.json", data)


def load_authority(home: Home) -> Authority:
    return Authority.load(home.receiver_directory / "authority")


def open_trust(home: Home) -> TrustStore:
    return TrustStore(home.receiver_directory / TRUST_NAME)


def split_listen(listen: str) -> tuple[str, int]:
    """HOST:PORT, port 0 for any. UsageError."""
    return _split(listen, "to listen on")


def join_address(host: str, port: int) -> str:
    """HOST:PORT, as `split_listen` takes it apart."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _split(address: str, purpose: str) -> tuple[str, int]:
    host, colon, port = address.rpartition(":")
    is_text = len(address) <= ADDRESS_CHARACTERS_MAX and address.isprintable()
    if not (is_text and colon and is_port(port)):
        raise _no_address(address, purpose)
    return host.removeprefix("[").removesuffix("]"), int(port)


def _no_address(address: str, purpose: str) -> UsageError:
    return UsageError(f"{address[:80]!r} is not an address {purpose}", hint="write HOST:PORT")


def invite(home: Home, *, expires_seconds: float, groups: list[str], address: str | None) -> str:
    """A one-time token, as text. Works beside a running receiver."""
    configuration = read_configuration(home)
    for group in groups:
        check_name(group, "group")
    if address is None:
        host, port = split_listen(configuration.listen)
        host = socket.gethostname() if host in ANY_HOSTS else host
        address = join_address(host, port)
    host, port = _split(address, "to reach")
    if not host or not port:
        raise _no_address(address, "to reach")
    authority = load_authority(home)
    now = time.time_ns()
    with closing(open_trust(home)) as trust:
        secret = trust.create_invite(expires_seconds, groups, now)
    return encode_token(
        Token(
            address=address,
            fingerprint=authority.fingerprint,
            secret=secret,
            expiry_ns=now + int(expires_seconds * NANOSECONDS_PER_SECOND),
        )
    )

"""Certificates: EC P-256 keys, X.509, one private CA per receiver.

==========  ===========================================  ========================================
who         subject alternative names                    extended key usage
==========  ===========================================  ========================================
CA          none (path length 0)                         none; may only sign certificates
receiver    DNS receiver.blockrepl, enrol.blockrepl      server authentication
source      URI urn:uuid:<source id>; CN = source name   client authentication
==========  ===========================================  ========================================

A receiver is always verified against its two fixed names, never a host name: it may move to another
address without a new certificate. A source's certificate can never pass for a receiver's, nor the
other way round: names and key usage both differ.

An authority's directory: `ca.key`, `ca.pem`, `server.key`, `server.pem`; keys have mode 0600. It is
created whole by one rename.
"""

from __future__ import annotations

import re
import uuid
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from blockrepl import limits
from blockrepl.channel.handshake import ENROL_SERVER_NAME, RECEIVER_SERVER_NAME
from blockrepl.channel.whole_directory import create_directory
from blockrepl.errors import PeerError, StateError, StorageError, TrustError

# Who may come in is the trust store's to say, and no clock's: a certificate that ends would stop
# all sources at once some day, and one begun by a wrong clock be refused by the right ones.
BEGIN = datetime(2020, 1, 1, tzinfo=timezone.utc)
END = datetime(9999, 12, 31, 23, 59, 59, tzinfo=timezone.utc)  # never (RFC 5280, 4.1.2.5)
CURVE = ec.SECP256R1()

CA_KEY, CA_CERTIFICATE = "ca.key", "ca.pem"
SERVER_KEY, SERVER_CERTIFICATE = "server.key", "server.pem"

# What reading a certificate or request of a peer's making may raise. Found by fuzzing.
_UNSOUND = (
    ValueError,
    TypeError,
    InvalidSignature,
    UnsupportedAlgorithm,
    x509.DuplicateExtension,
    x509.ExtensionNotFound,
    x509.InvalidVersion,
    x509.UnsupportedGeneralNameType,
)

_SIGNING_ONLY = x509.KeyUsage(
    digital_signature=True,
    key_cert_sign=False,
    crl_sign=False,
    content_commitment=False,
    key_encipherment=False,
    data_encipherment=False,
    key_agreement=False,
    encipher_only=False,
    decipher_only=False,
)
_CERTIFYING_ONLY = x509.KeyUsage(
    digital_signature=False,
    key_cert_sign=True,
    crl_sign=True,
    content_commitment=False,
    key_encipherment=False,
    data_encipherment=False,
    key_agreement=False,
    encipher_only=False,
    decipher_only=False,
)


@dataclass(frozen=True)
class PeerIdentity:
    """Who a source's certificate says it is. `serial` is the certificate's, in hexadecimal."""

    name: str
    source_id: str
    serial: str


class Authority:
    """A receiver's CA, and the receiver's own certificate signed by it."""

    def __init__(
        self, directory: Path, key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate
    ) -> None:
        self._key = key
        self._certificate = certificate
        self.ca_pem = to_pem(certificate)
        self.server_certificate_path = directory / SERVER_CERTIFICATE
        self.server_key_path = directory / SERVER_KEY

    @classmethod
    def create(cls, directory: Path) -> Authority:
        """Make a new CA and server certificate; the directory must not exist or be empty."""
        ca_key = ec.generate_private_key(CURVE)
        # A name of its own, so that two receivers' CAs are never taken for one another.
        ca_name = _name(f"blockrepl receiver {uuid.uuid4()}")
        ca = _ca_certificate(ca_key, ca_name)
        server_key = ec.generate_private_key(CURVE)
        names = [x509.DNSName(name) for name in (RECEIVER_SERVER_NAME, ENROL_SERVER_NAME)]
        server = _leaf(
            server_key.public_key(),
            _name(RECEIVER_SERVER_NAME),
            names,
            ExtendedKeyUsageOID.SERVER_AUTH,
            issuer=ca,
            issuer_key=ca_key,
        )
        files = {
            CA_KEY: key_to_pem(ca_key),
            CA_CERTIFICATE: to_pem(ca),
            SERVER_KEY: key_to_pem(server_key),
            SERVER_CERTIFICATE: to_pem(server),
        }
        if not create_directory(directory, files):
            raise StateError(
                f"{directory} already holds an authority",
                hint="a receiver is initialised once; use another --home for a second one",
                code="exists",
            )
        return cls(directory, ca_key, ca)

    @classmethod
    def load(cls, directory: Path) -> Authority:
        """Raises StateError if there is none, StorageError if it cannot be read."""
        try:
            key = serialization.load_pem_private_key((directory / CA_KEY).read_bytes(), None)
            certificate = x509.load_pem_x509_certificate((directory / CA_CERTIFICATE).read_bytes())
        except FileNotFoundError as error:
            raise StateError(
                f"there is no receiver in {directory}", hint="run `blockrepl receiver init` first"
            ) from error
        except (OSError, ValueError) as error:
            raise StorageError(f"the authority in {directory} is unreadable: {error}") from error
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise StorageError(f"{directory / CA_KEY} is not an elliptic-curve key")
        return cls(directory, key, certificate)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the CA certificate's DER, in hexadecimal."""
        return self._certificate.fingerprint(hashes.SHA256()).hex()

    def sign(self, request_pem: str, name: str, source_id: str) -> tuple[str, str]:
        """A source's certificate (PEM) and its serial, for the key in its request.

        Nothing but the key is taken from the request. Raises PeerError if it does not parse.
        """
        public_key = _request_key(request_pem)
        certificate = _leaf(
            public_key,
            _name(check_name(name)),
            [x509.UniformResourceIdentifier(uuid.UUID(source_id).urn)],
            ExtendedKeyUsageOID.CLIENT_AUTH,
            issuer=self._certificate,
            issuer_key=self._key,
        )
        return to_pem(certificate), _serial(certificate)


def make_key_and_request() -> tuple[ec.EllipticCurvePrivateKey, str]:
    """A new private key, and a signing request (PEM) that proves its possession."""
    key = ec.generate_private_key(CURVE)
    request = x509.CertificateSigningRequestBuilder().subject_name(_name("source"))
    pem = request.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
    return key, pem.decode()


def read_identity(certificate: bytes | str) -> PeerIdentity:
    """Who the certificate (DER bytes or PEM text) names. Does not verify who signed it.

    Raises TrustError if it is no source's certificate.
    """
    try:
        if isinstance(certificate, str):
            parsed = x509.load_pem_x509_certificate(certificate.encode())
        else:
            parsed = x509.load_der_x509_certificate(certificate)
        (common_name,) = parsed.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
        names = parsed.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        (uri,) = names.get_values_for_type(x509.UniformResourceIdentifier)
        if not uri.startswith("urn:uuid:"):
            raise ValueError("no urn:uuid")
        name = common_name.value
        source_id = str(uuid.UUID(uri))
    except _UNSOUND as error:
        raise TrustError(
            "the peer's certificate is not that of a source", code="certificate"
        ) from error
    return PeerIdentity(check_name(str(name)), source_id, _serial(parsed))


def check_name(name: str) -> str:
    if not re.fullmatch(limits.NAME_PATTERN, name):
        raise TrustError(
            f"{name[:64]!r} is not a name for a source",
            hint="use lower-case letters, digits, dot, underscore and dash; at most 63",
            code="name",
        )
    return name


def verify_receiver(ca_pem: str, fingerprint: str, leaf_der: bytes) -> None:
    """Check that the CA is the one of this fingerprint, and the leaf its receiver's certificate.

    Raises TrustError, whatever the bytes are.
    """
    refusal = TrustError(
        "the receiver at this address is not the one that made the token",
        hint="check the address; make a new token with `blockrepl receiver invite`",
        code="fingerprint",
    )
    try:
        ca = x509.load_pem_x509_certificate(ca_pem.encode())
        if ca.fingerprint(hashes.SHA256()).hex() != fingerprint:
            raise refusal
        leaf = x509.load_der_x509_certificate(leaf_der)
        leaf.verify_directly_issued_by(ca)
        names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        # A source's certificate has the same issuer: it must not pass for the receiver's.
        if ENROL_SERVER_NAME not in names.get_values_for_type(x509.DNSName):
            raise refusal
    except _UNSOUND as error:
        raise refusal from error


def verify_own_certificate(
    certificate_pem: str, ca_pem: str, key: ec.EllipticCurvePrivateKey
) -> PeerIdentity:
    """Check that a certificate we were given is for our key and signed by this CA."""
    identity = read_identity(certificate_pem)
    try:
        certificate = x509.load_pem_x509_certificate(certificate_pem.encode())
        certificate.verify_directly_issued_by(x509.load_pem_x509_certificate(ca_pem.encode()))
        if certificate.public_key() != key.public_key():
            raise ValueError("another key")
    except _UNSOUND as error:
        raise TrustError("the receiver answered with a useless certificate") from error
    return identity


def to_pem(certificate: x509.Certificate) -> str:
    return certificate.public_bytes(serialization.Encoding.PEM).decode()


def key_to_pem(key: ec.EllipticCurvePrivateKey) -> str:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    ).decode()


def _request_key(request_pem: str) -> ec.EllipticCurvePublicKey:
    try:
        request = x509.load_pem_x509_csr(request_pem.encode())
        key = request.public_key()
        if not request.is_signature_valid:
            raise ValueError("its signature is wrong")
    except _UNSOUND as error:
        raise PeerError(f"the certificate request does not parse: {error}") from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name != CURVE.name:
        raise PeerError("the certificate request is not for an EC P-256 key")
    return key


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _serial(certificate: x509.Certificate) -> str:
    return f"{certificate.serial_number:x}"


def _builder(public_key: ec.EllipticCurvePublicKey, name: x509.Name) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(BEGIN)
        .not_valid_after(END)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
    )


def _ca_certificate(key: ec.EllipticCurvePrivateKey, name: x509.Name) -> x509.Certificate:
    return (
        _builder(key.public_key(), name)
        .issuer_name(name)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_CERTIFYING_ONLY, critical=True)
        .sign(key, hashes.SHA256())
    )


def _leaf(
    public_key: ec.EllipticCurvePublicKey,
    name: x509.Name,
    alternative_names: list[x509.DNSName] | list[x509.UniformResourceIdentifier],
    usage: x509.ObjectIdentifier,
    *,
    issuer: x509.Certificate,
    issuer_key: ec.EllipticCurvePrivateKey,
) -> x509.Certificate:
    issuer_identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key())
    return (
        _builder(public_key, name)
        .issuer_name(issuer.subject)
        .add_extension(issuer_identifier, critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_SIGNING_ONLY, critical=True)
        .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        .add_extension(x509.SubjectAlternativeName(alternative_names), critical=False)
        .sign(issuer_key, hashes.SHA256())
    )

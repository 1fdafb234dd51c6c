"""TLS towards clients: one context for all connections, which another may replace; those there are keep theirs."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Final, NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from OpenSSL import SSL
from OpenSSL.crypto import X509, PKey
from twisted.internet.interfaces import IOpenSSLServerConnectionCreator
from twisted.internet.ssl import Certificate, CertificateOptions, TLSVersion, trustRootFromCertificates
from twisted.protocols.tls import TLSMemoryBIOFactory, TLSMemoryBIOProtocol
from zope.interface import implementer

ALPN: Final = [b"http/1.1"]


class Identity(NamedTuple):
    """What a server shows to its clients, and until when that is good."""

    context: SSL.Context
    subject: str
    not_before: datetime
    not_after: datetime


def identity(chain: bytes, key: bytes, client_ca: bytes | None = None) -> Identity:
    """Of PEM: the server's certificate and those between it and its authority, its key, and the authorities of clients that
    must show a certificate too. Raises ValueError."""
    certificates = _certificates(chain)
    leaf = certificates[0]
    private = _private_key(key)
    if private.public_key() != leaf.public_key():
        raise ValueError("the key is not that of the certificate")
    options = CertificateOptions(
        privateKey=PKey.from_cryptography_key(private),
        certificate=X509.from_cryptography(leaf),
        extraCertChain=[X509.from_cryptography(one) for one in certificates[1:]],
        raiseMinimumTo=TLSVersion.TLSv1_2,
        acceptableProtocols=ALPN,
        trustRoot=_authorities(client_ca) if client_ca is not None else None,
    )
    try:
        context = options.getContext()
    except SSL.Error as problem:
        raise ValueError(f"OpenSSL refuses it: {problem}") from None
    return Identity(context, leaf.subject.rfc4514_string(), leaf.not_valid_before_utc, leaf.not_valid_after_utc)


def _certificates(pem: bytes) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(pem)
    except ValueError:
        raise ValueError("has no certificate in PEM, or a broken one") from None


def _private_key(pem: bytes) -> Any:
    try:
        return serialization.load_pem_private_key(pem, None)
    except TypeError:
        raise ValueError("the key has a password: take it off (openssl pkey)") from None
    except ValueError:
        raise ValueError("has no private key in PEM, or a broken one") from None


def _authorities(pem: bytes) -> Any:
    return trustRootFromCertificates([Certificate(X509.from_cryptography(one)) for one in _certificates(pem)])


@implementer(IOpenSSLServerConnectionCreator)
class Identities:
    """The `Identity` for connections to come."""

    now: Identity

    def serverConnectionForTLS(self, tlsProtocol: Any) -> SSL.Connection:
        return SSL.Connection(self.now.context, None)


class _Transport(TLSMemoryBIOProtocol):
    """TLS as a transport for `gateway.net.channel.Channel`, which asks more of it than twisted's."""

    def getHandle(self) -> Any:
        """The socket, of which it is asked how much a slow client has taken."""
        return self.transport.getHandle()  # type: ignore[union-attr]  # it is connected

    def loseConnection(self) -> None:
        """Who says this writes nothing more; but twisted waits for producers that may."""
        self.unregisterProducer()
        super().loseConnection()

    def _shutdownTLS(self) -> None:
        """Nobody is waited for to say goodbye too (RFC 8446 section 6.1): a client's idle pool does not even listen."""
        super()._shutdownTLS()
        if self.disconnecting:
            self.transport.loseConnection()  # type: ignore[union-attr]  # it is connected

    def loseWriteConnection(self) -> None:
        """Say that nothing more comes, and read on."""
        if self._tlsConnection is None or not self._handshakeDone:
            self.abortConnection()
            return
        self._shutdownTLS()
        self.transport.loseWriteConnection()  # type: ignore[union-attr]  # it is connected

    def abortConnection(self) -> None:
        if self._tlsConnection is not None:
            super().abortConnection()


class TLSFactory(TLSMemoryBIOFactory):
    """TLS around the connections of another factory, which may refuse some."""

    protocol = _Transport

    def buildProtocol(self, addr: Any) -> Any:
        made = self.wrappedFactory.buildProtocol(addr)
        return self.protocol(self, made) if made is not None else None

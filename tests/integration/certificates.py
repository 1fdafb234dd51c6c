"""Certificates that are made when a test needs them."""

from __future__ import annotations

import datetime
import ipaddress
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

DAY = datetime.timedelta(days=1)


def _name(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


class Authority:
    """Signs certificates; its own is in ``file``."""

    def __init__(self, directory: Path, name: str = "authority") -> None:
        self._directory = directory
        self._name = _name(name)
        self._key = ec.generate_private_key(ec.SECP256R1())
        self.file = directory / f"{name}.pem"
        own = self._builder(name, self._key, -1, 30).add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
        self.file.write_bytes(_pem(own.sign(self._key, hashes.SHA256())))

    def _builder(self, name: str, key: ec.EllipticCurvePrivateKey, begins: int, ends: int) -> x509.CertificateBuilder:
        now = datetime.datetime.now(datetime.UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(_name(name))
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now + begins * DAY)
            .not_valid_after(now + ends * DAY)
        )

    def issue(self, name: str, begins: int = -1, ends: int = 10) -> tuple[bytes, bytes]:
        """PEM of a certificate for 127.0.0.1, and of its key."""
        key = ec.generate_private_key(ec.SECP256R1())
        names = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1")), x509.DNSName("localhost")])
        signed = self._builder(name, key, begins, ends).add_extension(names, critical=False).sign(self._key, hashes.SHA256())
        plain = serialization.NoEncryption()
        return _pem(signed), key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain)

    def write(self, name: str) -> tuple[Path, Path]:
        """Files with a certificate and its key."""
        paths = self._directory / f"{name}.crt", self._directory / f"{name}.key"
        for path, pem in zip(paths, self.issue(name), strict=True):
            path.write_bytes(pem)
        return paths


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)

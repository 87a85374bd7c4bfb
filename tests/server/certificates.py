"""Certificates for 127.0.0.1, made in the test that uses them."""

from __future__ import annotations

import datetime
import ipaddress
from pathlib import Path
from typing import NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID


class Authority(NamedTuple):
    """Whoever signs certificates; its own is a PEM file."""

    certificate: Path
    name: x509.Name
    private: ec.EllipticCurvePrivateKey


def self_signed(folder: Path) -> tuple[Path, Path]:
    """Certificate and key of 127.0.0.1, PEM files in `folder`."""
    private, name = ec.generate_private_key(ec.SECP256R1()), _name("127.0.0.1")
    return _write(folder, _certificate(name, private, name, private), private)


def authority(folder: Path) -> Authority:
    """A new one; its certificate lies in `folder`, which is made."""
    folder.mkdir()
    private, name = ec.generate_private_key(ec.SECP256R1()), _name(folder.name)
    certificate = folder / "authority.pem"
    certificate.write_bytes(_pem(_certificate(name, private, name, private, signs=True)))
    return Authority(certificate, name, private)


def signed_by(signer: Authority, folder: Path) -> tuple[Path, Path]:
    """Certificate and key that `signer` vouches for, PEM files in `folder`."""
    private = ec.generate_private_key(ec.SECP256R1())
    return _write(folder, _certificate(_name("client"), private, signer.name, signer.private), private)


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _certificate(
    name: x509.Name,
    private: ec.EllipticCurvePrivateKey,
    issuer: x509.Name,
    signer: ec.EllipticCurvePrivateKey,
    *,
    signs: bool = False,
) -> x509.Certificate:
    now = datetime.datetime.now(datetime.UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(issuer)
        .public_key(private.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False
        )
    )
    if signs:
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    return builder.sign(signer, hashes.SHA256())


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _write(
    folder: Path, certificate: x509.Certificate, private: ec.EllipticCurvePrivateKey
) -> tuple[Path, Path]:
    paths = folder / "certificate.pem", folder / "key.pem"
    paths[0].write_bytes(_pem(certificate))
    paths[1].write_bytes(
        private.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    return paths

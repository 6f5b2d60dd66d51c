"""TLS and mutual TLS of each plane, with real certificates, a revocation list and an encrypted key."""

from __future__ import annotations

import datetime
import json
import ssl
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from live_service import Live, golden_loader

from golden import model_dir
from llm_boost.config.service_config import TlsFiles, service_config
from llm_boost.errors import ConfigError
from llm_boost.service.tls import tls_context

PASSWORD = "open sesame"


@dataclass
class Pki:
    """A CA with its files under MindIE's default names, and two clients, one of them revoked."""

    base: Path
    ca: trustme.CA
    client: Path
    revoked: Path

    def http(self, client: Path | None) -> httpx.Client:
        context = ssl.create_default_context()
        self.ca.configure_trust(context)
        if client is not None:
            context.load_cert_chain(client)
        return httpx.Client(verify=context, timeout=20)


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    base = tmp_path_factory.mktemp("mindie")
    ca = trustme.CA()
    security = base / "security"
    for folder in ("ca", "certs/management", "keys/management", "pass/management"):
        (security / folder).mkdir(parents=True)
    for plane, address in (("", "127.0.0.1"), ("management/", "127.0.0.2")):
        cert = ca.issue_cert(address)
        (security / "certs" / plane / "server.pem").write_bytes(
            b"".join(blob.bytes() for blob in cert.cert_chain_pems)
        )
        key = serialization.load_pem_private_key(cert.private_key_pem.bytes(), None)
        encrypted = key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(PASSWORD.encode()),
        )
        (security / "keys" / plane / "server.key.pem").write_bytes(encrypted)
        (security / "pass" / plane / "key_pwd.txt").write_text(PASSWORD + "\n")
    for name in ("ca.pem", "management_ca.pem"):
        ca.cert_pem.write_to_path(str(security / "ca" / name))
    clients = []
    for name in ("good", "revoked"):
        cert = ca.issue_cert(f"{name}@example.org")
        cert.private_key_and_cert_chain_pem.write_to_path(str(base / f"{name}.pem"))
        clients.append(x509.load_pem_x509_certificate(cert.cert_chain_pems[0].bytes()))
    _write_crl(ca, clients[1].serial_number, security / "certs/server_crl.pem")
    return Pki(base, ca, base / "good.pem", base / "revoked.pem")


def _write_crl(ca: trustme.CA, serial: int, path: Path) -> None:
    now = datetime.datetime.now(datetime.timezone.utc)
    gone = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(now).build()
    builder = x509.CertificateRevocationListBuilder().add_revoked_certificate(gone)
    issuer = x509.load_pem_x509_certificate(ca.cert_pem.bytes()).subject
    day = datetime.timedelta(days=1)
    key = serialization.load_pem_private_key(ca.private_key_pem.bytes(), None)
    crl = builder.issuer_name(issuer).last_update(now - day).next_update(now + day).sign(key, hashes.SHA256())
    path.write_bytes(crl.public_bytes(serialization.Encoding.PEM))


@pytest.fixture(scope="module")
def secure(pki: Pki, packed: Path):
    (pki.base / "conf").mkdir()
    config = {
        "ServerConfig": {"httpsEnabled": True, "tlsCrl": "security/certs/server_crl.pem"},
        "BackendConfig": {
            "ModelDeployConfig": {
                "maxSeqLen": 512,
                "maxInputTokenLen": 256,
                "ModelConfig": [{"modelName": "qwen2", "modelWeightPath": str(model_dir("qwen2"))}],
            }
        },
    }
    path = pki.base / "conf" / "config.json"
    path.write_text(json.dumps(config))
    ports = {"port": 0, "management_port": 0, "metrics_port": 0}
    live = Live(service_config({"config": str(path), **ports}, {}), golden_loader("qwen2", packed))
    yield live
    live.stop()


def test_a_client_with_a_certificate_is_served_on_every_plane(secure: Live, pki: Pki) -> None:
    assert secure.running is not None
    addresses = secure.running.addresses
    assert all(address.startswith("https://") for address in addresses.values())
    with pki.http(pki.client) as http:
        answer = http.post(f"{addresses['business']}/generate", json={"inputs": "hello"})
        assert answer.status_code == 200
        assert http.get(f"{addresses['management']}/v1/config").status_code == 200
        assert http.get(f"{addresses['metrics']}/metrics").status_code == 200


@pytest.mark.parametrize("plane", ["business", "management", "metrics"])
def test_a_client_without_one_is_not(secure: Live, pki: Pki, plane: str) -> None:
    assert secure.running is not None
    with pki.http(None) as http, pytest.raises(httpx.TransportError):
        http.get(secure.running.addresses[plane] + "/health")


def test_a_revoked_client_is_not(secure: Live, pki: Pki) -> None:
    with pki.http(pki.revoked) as http, pytest.raises(httpx.TransportError):
        http.get(f"{secure.url}/health")


def test_plain_http_on_a_tls_port_gets_nothing(secure: Live) -> None:
    with pytest.raises(httpx.TransportError):
        httpx.get(secure.url.replace("https", "http") + "/health")


def test_files_that_cannot_be_used(pki: Pki, tmp_path: Path) -> None:
    security = pki.base / "security"
    cert, key = security / "certs/server.pem", security / "keys/server.key.pem"
    password, junk = security / "pass/key_pwd.txt", tmp_path / "junk.pem"
    junk.write_text("junk")
    wrong = tmp_path / "wrong.txt"
    wrong.write_text("wrong")
    cases = {
        "no such file": TlsFiles(tmp_path / "none.pem", key),
        "wrong password": TlsFiles(cert, key, wrong),
        "neither a password file nor a terminal": TlsFiles(cert, key),
        "not a certificate and its key": TlsFiles(junk, key, password),
        "not a CA certificate": TlsFiles(cert, key, password, (junk,)),
        "not a revocation list": TlsFiles(cert, key, password, (), (junk,)),
    }
    for says, files in cases.items():
        with pytest.raises(ConfigError, match=says):
            tls_context(files)

"""TLS of a plane, from the files that its configuration names."""

from __future__ import annotations

import ssl
import sys
from pathlib import Path

from llm_boost.config.service_config import TlsFiles
from llm_boost.errors import ConfigError


def tls_context(files: TlsFiles) -> ssl.SSLContext:
    """TLS 1.2 or later; clients must show a certificate of the CA where there is one, and not a revoked one.

    An encrypted key without a password file asks for the password on the terminal.

    Raises:
        ConfigError: the file that cannot be used, and why.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    for path in (files.cert, files.key, *files.ca_files, *files.crl_files):
        if not path.is_file():
            raise ConfigError(f"{path}: no such file; TLS needs it (or set httpsEnabled to false)")
    password = None if files.key_password is None else _password(files.key_password)
    try:
        context.load_cert_chain(files.cert, files.key, password or _refuse_without_terminal)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{files.cert}, {files.key}: not a certificate and its key, or a wrong password: {error}"
        ) from None
    if files.ca_files:
        context.verify_mode = ssl.CERT_REQUIRED
        for path in files.ca_files:
            _load(context, path, "CA certificate")
    for path in files.crl_files:
        _load(context, path, "revocation list")
        context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF
    return context


def _load(context: ssl.SSLContext, path: Path, what: str) -> None:
    try:
        context.load_verify_locations(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: not a {what} in PEM form: {error}") from None


def _password(path: Path) -> str:
    try:
        return path.read_text("utf-8").rstrip("\r\n")
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"{path}: cannot read the key's password: {error}") from None


def _refuse_without_terminal() -> str:
    import getpass

    if not sys.stdin.isatty():
        raise ValueError(
            "the key is encrypted, and there is neither a password file nor a terminal to ask on"
        )
    return getpass.getpass("Password of the TLS key: ")

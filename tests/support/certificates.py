"""Certificates that vouch for themselves, for servers and clients that speak TLS."""

import subprocess
from pathlib import Path
from typing import NamedTuple

from tests.support.programs import program


class Certificate(NamedTuple):
    """Two files in PEM."""

    path: Path
    key: Path


def make_certificate(folder: Path, name: str, *, reached_as: str = "", password: str = "") -> Certificate:
    """One for two days, in ``NAME.pem`` and ``NAME.key``.

    ``reached_as`` is a server's subjectAltName, such as ``DNS:localhost``; ``password`` is that of the key's file.
    """
    made = Certificate(folder / f"{name}.pem", folder / f"{name}.key")
    kind = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-days", "2"]
    names = ["-subj", f"/CN={name}", *(["-addext", f"subjectAltName={reached_as}"] if reached_as else [])]
    lock = ["-passout", f"pass:{password}"] if password else ["-nodes"]
    files = ["-keyout", str(made.key), "-out", str(made.path)]
    command = [program("openssl", "openssl"), "req", "-x509", *kind, *names, *lock, *files]
    subprocess.run(command, check=True, capture_output=True)
    return made

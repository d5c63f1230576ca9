"""Signed snapshots: an Ed25519 signature (RFC 8032) of the snapshot's id, which is the hash of its content.

The signature stands beside the id in the file, so that it survives every copy of it. Keys are 32 bytes, written in
base64. cryptography is imported where it is used: only those who sign need it.
"""

import base64

from tilewise.domain.errors import SettingsError

_MISSING = "signing needs the package cryptography: pip install 'tilewise[server]'"


def generate() -> tuple[str, str]:
    """Return a new private key and its public one, in base64."""
    try:
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    except ModuleNotFoundError as error:
        raise SettingsError(_MISSING) from error
    made = Ed25519PrivateKey.generate()
    return _text(made.private_bytes_raw()), _text(made.public_key().public_bytes_raw())


class Signer:
    """Signs with a private key in base64. Raises SettingsError for what is none."""

    def __init__(self, private_key: str) -> None:
        try:
            from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

            self._key = Ed25519PrivateKey.from_private_bytes(base64.b64decode(private_key.strip(), validate=True))
        except ModuleNotFoundError as error:
            raise SettingsError(_MISSING) from error
        except ValueError as error:
            raise SettingsError(
                f"signing key: expected 32 bytes in base64 ({error}); `tilewise snapshot keygen` makes one"
            ) from error

    @property
    def public_key(self) -> str:
        return _text(self._key.public_key().public_bytes_raw())

    def sign(self, snapshot_id: str) -> str:
        """Return the signature of a snapshot, in base64."""
        return _text(self._key.sign(snapshot_id.encode()))


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()

"""Checks the Ed25519 signature (RFC 8032) that stands beside a snapshot's id, where a key is configured."""

import base64

from tilewise.domain.errors import SnapshotError
from tilewise.domain.snapshot import Snapshot


def verify(snapshot: Snapshot, key: str | None, *, name: str) -> Snapshot:
    """Return `snapshot` where it is signed with the private key of `key` (base64), or where `key` is None.

    Its content was compared with its id when it was read, and `key` looked at by Settings. Raises SnapshotError for
    another signature, none, or one that cannot be checked here.
    """
    if key is None:
        return snapshot
    try:
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    except ModuleNotFoundError as error:
        raise SnapshotError(
            f"{name} cannot be checked with TILEWISE_SNAPSHOT_KEY: pip install 'tilewise[signed]'"
        ) from error
    public = Ed25519PublicKey.from_public_bytes(base64.b64decode(key))
    if snapshot.signature is None:
        raise SnapshotError(f"{name} is not signed, and TILEWISE_SNAPSHOT_KEY asks for it; export it with --sign-with")
    try:
        public.verify(base64.b64decode(snapshot.signature, validate=True), snapshot.id.encode())
    except (InvalidSignature, ValueError) as error:
        raise SnapshotError(f"{name} is not signed with the key of TILEWISE_SNAPSHOT_KEY; use one that is") from error
    return snapshot

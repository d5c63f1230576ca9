"""How a service is run."""

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceSettings:
    """What whoever starts the service decides.

    - require_tokens: refuse requests without one even where no token was ever created.
    - max_body: bytes of one request's body.
    - rate, burst: requests a second of one token or address in the long run, and at once; a rate of 0 limits nothing.
    - access_log: write a line for every request, not only for changes and mistakes.
    - any_host: answer requests without a token under any name of this service; else only under an address or a name
      without dots: a web page whose own name was made to point here (DNS rebinding) cannot use a browser to ask.
    - signing_key: the Ed25519 private key, in base64, that snapshots are signed with.
    """

    require_tokens: bool = False
    max_body: int = 2**20
    rate: float = 500.0
    burst: int = 5000
    access_log: bool = False
    any_host: bool = False
    signing_key: str | None = field(default=None, repr=False)

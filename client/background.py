"""The one daemon thread of a process: keeps the downloads of its clients fresh, and tells the service what was used.

Nothing that it does changes the answers of a run. It starts with the first ready() of a client with a remote source,
and not again by itself in a forked child. A source that fails is asked again after 1 s, then 2, up to 30; one that
refuses the token after 3 minutes, for a token may be renewed. All with jitter, so that a fleet does not come at once.
"""

import atexit
import logging
import os
import random
import threading
import time
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tilewise.domain.errors import RefusedError, TilewiseError

if TYPE_CHECKING:
    from .client import Client

POLL_SECONDS = 300.0
FIRST_BACKOFF, LAST_BACKOFF, REFUSED_BACKOFF = 1.0, 30.0, 180.0
LAST_WORDS_SECONDS = 1.0
log = logging.getLogger("tilewise")


@dataclass(slots=True)
class _Turn:
    """When a client's source is asked next, by the monotonic clock, and how long it failed."""

    due: float
    backoff: float = 0.0


class Background:
    def __init__(self) -> None:
        self._reset()
        os.register_at_fork(after_in_child=self._reset)

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._turns: weakref.WeakKeyDictionary[Client, _Turn] = weakref.WeakKeyDictionary()
        self._thread: threading.Thread | None = None

    def follow(self, client: "Client", *, failed: bool) -> None:
        """Look after `client` from now on; where its source just failed, soon."""
        with self._lock:
            turn = self._turns.setdefault(client, _Turn(0.0))
            turn.due = time.monotonic() + after(turn, failed=failed, refused=False)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="tilewise-background", daemon=True)
                try:
                    self._thread.start()
                except RuntimeError as error:  # no more threads here: the run goes on without
                    log.info("answers are not followed: %s", error)
                    self._thread = None
        self._wake.set()

    def _run(self) -> None:
        while True:
            with self._lock:
                turns = list(self._turns.items())
            if not turns:
                wait = POLL_SECONDS
            else:
                client, turn = min(turns, key=lambda pair: pair[1].due)
                wait = turn.due - time.monotonic()
                if wait <= 0:
                    turn.due = time.monotonic() + self._visit(client, turn)
                    del client
                    continue
                del client
            del turns  # a client that nobody else holds must be free to go
            self._wake.wait(wait)
            self._wake.clear()

    def _visit(self, client: "Client", turn: _Turn) -> float:
        """Ask and tell the source of `client`; return the seconds until the next time. Never raises."""
        try:
            client.revalidate()
        except RefusedError as error:
            log.info("%s", error)
            return after(turn, failed=True, refused=True)
        except TilewiseError as error:
            log.info("%s", error)
            return after(turn, failed=True, refused=False)
        except Exception:  # a mistake of ours must not end the thread, nor be seen by the run
            log.info("the background thread failed", exc_info=True)
            return after(turn, failed=True, refused=False)
        return after(turn, failed=False, refused=False)

    def last_words(self) -> None:
        """Tell at the end of the process what was not told yet, in at most a second, where the source was well."""
        end = time.monotonic() + LAST_WORDS_SECONDS
        for client, turn in list(self._turns.items()):
            left = end - time.monotonic()
            if turn.backoff == 0 and left > 0.1:
                try:
                    client.report(timeout=left)
                except TilewiseError as error:
                    log.info("%s", error)


def after(turn: _Turn, *, failed: bool, refused: bool) -> float:
    """Return the seconds to wait, jittered by up to half, and note a failure in `turn`."""
    if not failed:
        turn.backoff = 0.0
        return POLL_SECONDS * random.uniform(0.5, 1.0)
    turn.backoff = min(LAST_BACKOFF, max(FIRST_BACKOFF, turn.backoff * 2))
    return (REFUSED_BACKOFF if refused else turn.backoff) * random.uniform(0.5, 1.0)


background = Background()
atexit.register(background.last_words)

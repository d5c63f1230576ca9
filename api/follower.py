"""A daemon thread that keeps something of the service up with the database."""

import logging
import threading
from collections.abc import Callable

STOP_SECONDS = 10.0  # that the thread has to end
_log = logging.getLogger("tilewise.api")


class Follower:
    """Calls `keep_up` at once and every so many seconds, from `start` to `stop`; `what` says of what it keeps up."""

    def __init__(self, what: str, keep_up: Callable[[], None], *, seconds: float) -> None:
        self._what, self._keep_up, self._seconds = what, keep_up, seconds
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        self._thread = threading.Thread(target=self._follow, name=f"tilewise-{self._what}", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Return when the thread has ended, so that the database can be closed; or after some seconds in a hang."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(STOP_SECONDS)

    def _follow(self) -> None:
        while True:
            try:
                self._keep_up()
            except Exception:  # a mistake here must not leave the service with old answers and tokens for ever
                _log.exception("the %s could not be refreshed", self._what)
            if self._stop.wait(self._seconds):
                return

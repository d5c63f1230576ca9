"""Work with a time limit that holds whatever the work does."""

import queue
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from tilewise.domain.errors import SourceError, TilewiseError

T = TypeVar("T")


class _Result(Generic[T]):
    def __init__(self, value: T | None = None, error: TilewiseError | None = None) -> None:
        self.value, self.error = value, error


def within(timeout: float, work: Callable[[], T], *, name: str) -> T:
    """Return `work()`, run on a daemon thread, or raise SourceError once `timeout` seconds have passed.

    A thread cannot be stopped: work that outlives its limit goes on unheard, and ends with the process. An exception
    that is not a TilewiseError becomes a SourceError: nothing that a source does may end a training job.
    """
    results: queue.SimpleQueue[_Result[T]] = queue.SimpleQueue()

    def run() -> None:
        try:
            results.put(_Result(value=work()))
        except TilewiseError as error:
            results.put(_Result(error=error))
        except Exception as error:
            found = SourceError(f"{name} failed inside tilewise ({type(error).__name__}: {error}); please report it")
            found.__cause__ = error
            results.put(_Result(error=found))

    try:
        threading.Thread(target=run, name="tilewise-fetch", daemon=True).start()
    except RuntimeError as error:
        raise SourceError(f"{name} was not asked: no thread could be started ({error}); raise the limit") from error
    try:
        result = results.get(timeout=timeout)
    except queue.Empty:
        raise SourceError(too_slow(name, timeout)) from None
    if result.error is not None:
        raise result.error
    return result.value  # type: ignore[return-value]  # without an error it is what work() returned


def too_slow(name: str, timeout: float) -> str:
    return f"{name} gave no whole answer within {timeout:g} s; see whether it is up, or raise TILEWISE_TIMEOUT"

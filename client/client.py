"""Client: which plan a training job runs, from wherever the answers are kept.

client = Client(device.key, software, Settings.from_environment())
client.ready()                      # fetch, verify, seal; on any trouble one warning, and the last good answers
client.answer(problem).plan         # a dict lookup, which never raises and never waits for a network
client.table.snapshot_id            # what a restart pins: Settings(snapshot=id)
client.refresh()                    # the only way the answers change after ready()
"""

import logging
import os
import threading
import time
import weakref

from tilewise.domain.answer import Answer
from tilewise.domain.device import check_device_key
from tilewise.domain.errors import SnapshotError, SourceError
from tilewise.domain.problem import Problem
from tilewise.domain.snapshot import Snapshot
from tilewise.domain.software import Software

from . import paths
from .background import background
from .cache import DiskCache
from .deadline import within
from .settings import Settings, check_timeout
from .signature import verify
from .sources import SnapshotFile, Source, open_source
from .table import SealedTable
from .usage import Recorder, Used

log = logging.getLogger("tilewise")

_TROUBLE = (SourceError, SnapshotError)
# A peer of the same machine takes what its local rank 0 fetched so many seconds ago.
PEER_SECONDS = 30.0


class Client:
    """Answers for one device and one set of software versions.

    What it uses, once sealed, does not move: only `refresh` changes it. Without `ready`, the first `answer` seals
    what this machine holds already: a snapshot file, a SQLite file, the last download of a remote source.

    The constructor does no I/O. Raises DeviceError for a device key that cannot be one and SettingsError for a source
    of an unknown form. Threads may share a client, and a forked child goes on with the table of its parent.
    """

    def __init__(self, device_key: str, software: Software, settings: Settings) -> None:
        self.device_key = check_device_key(device_key)
        self.software, self.settings = software, settings
        self._embedded = SnapshotFile(paths.embedded_snapshot_path(), required=False)
        self._cache = DiskCache(paths.cache_dir())
        self._source = self._choose_source()
        self._table: SealedTable | None = None
        self._is_ready = False
        self._usage = Recorder()
        self._reset_locks()
        _clients.add(self)

    def _choose_source(self) -> Source:
        if self.settings.pinned_path is not None:
            return open_source(self.settings.pinned_path, token=self.settings.token)
        if self.settings.source is not None:
            return open_source(self.settings.source, token=self.settings.token)
        return self._embedded

    def _reset_locks(self) -> None:
        self._fetching = threading.Lock()  # held through a whole ready() or refresh()
        self._sealing = threading.Lock()  # held while the table is replaced

    # What a step calls

    def answer(self, problem: Problem) -> Answer:
        """Return what to run for `problem`; torch's own choice where nothing is known. Never raises."""
        table = self._table
        return (self._seal_local() if table is None else table).lookup(problem)

    def used(self, answer: Answer) -> Used:
        """Return the counter of an answer: whoever runs it does `used.calls += 1`, and the service is told."""
        return self._usage.of(answer)

    @property
    def table(self) -> SealedTable:
        """The sealed answers. Seals what this machine holds where nothing is sealed yet."""
        return self._table or self._seal_local()

    # What a job calls between steps

    def ready(self, timeout: float | None = None) -> SealedTable:
        """Fetch, verify and seal the answers, within `timeout` seconds (settings.timeout); once, then it is sealed.

        Where the source fails, one warning is logged and the last good answers are sealed: the last download, else the
        embedded snapshot, else none (every answer is then the default). Raises SnapshotError where the settings pin a
        snapshot and it cannot be had.
        """
        limit = self._limit(timeout)
        with self._fetching:
            return self._table if self._is_ready and self._table is not None else self._first(limit)

    def refresh(self, timeout: float | None = None) -> SealedTable:
        """Fetch again and seal what came. Where that fails, one warning is logged and the old table stays."""
        limit = self._limit(timeout)
        with self._fetching:
            table = self._table
            if table is None or not self._is_ready:
                return self._first(limit)
            try:
                snapshot = self._fetch(limit)
            except _TROUBLE as error:
                log.warning("%s. This run keeps its answers (%r).", error, table)
                self.follow(failed=True)
                return table
            self.follow(failed=False)
            return self.seal(snapshot, origin=self._source.name)

    def seal(self, snapshot: Snapshot, *, origin: str) -> SealedTable:
        """Make `snapshot` the answers of this run: what a rank does with the snapshot that its group agreed on."""
        with self._sealing:
            table = self._table
            if table is None or table.snapshot_id != snapshot.id:
                table = SealedTable(snapshot, self.device_key, self.software, origin=origin)
                self._table = table
            self._is_ready = True
            return table

    # How the answers are had

    def _limit(self, timeout: float | None) -> float:
        return self.settings.timeout if timeout is None else check_timeout(timeout)

    def _first(self, limit: float) -> SealedTable:
        pinned = self._pinned_here()
        if pinned is not None:
            self.follow(failed=False)
            return self.seal(pinned, origin=f"the last download from {self._source.name}")
        try:
            snapshot = self._fetch(limit)
            self.follow(failed=False)
            return self.seal(snapshot, origin=self._source.name)
        except _TROUBLE as error:
            self.follow(failed=True)
            if self.settings.snapshot is not None:
                raise SnapshotError(f"the pinned snapshot {self.settings.snapshot} cannot be had: {error}") from error
            snapshot, origin = self._fallback()
            log.warning("%s. This run goes on with %s.", error, origin)
            return self.seal(snapshot, origin=origin)

    def _fetch(self, limit: float) -> Snapshot:
        """Return what the source holds; of the processes of a machine that ask at once, one asks the source."""
        if self._source.local:
            return self._ask(self._source, limit)
        begun, end = time.time(), time.monotonic() + limit
        key = self._cache_key()
        with self._cache.turn(*key, timeout=limit):
            # what another process stored while this one waited its turn, or its local rank 0 just before
            young = PEER_SECONDS if os.environ.get("LOCAL_RANK", "0") != "0" else time.time() - begun
            known = self._cached()
            if known is not None and self._cache.age(*key) < young:
                return known
            snapshot = self._ask(self._source, end - time.monotonic(), known)
            self._cache.store(snapshot, *key)
            return snapshot

    def _cached(self) -> Snapshot | None:
        """Return the last download where it is what the settings ask for."""
        cached = self._cache.load(*self._cache_key())
        if cached is None:
            return None
        try:
            return self._checked(cached, "the last download")
        except SnapshotError as error:
            log.info("%s", error)
            return None

    def _ask(self, source: Source, limit: float, known: Snapshot | None = None) -> Snapshot:
        """Return what `source` holds, verified, and the pinned snapshot where one is pinned."""
        end = time.monotonic() + max(0.0, limit)
        pin = self.settings.pinned_id or self.settings.pinned_channel

        def work() -> Snapshot:
            left = max(0.001, end - time.monotonic())
            return source.fetch(self.device_key, timeout=left, pin=pin, known=known)

        return self._checked(within(max(0.0, limit), work, name=source.name), source.name)

    def _checked(self, snapshot: Snapshot, name: str) -> Snapshot:
        """Return `snapshot` where it is the pinned one, if one is, and signed, if a key is configured."""
        pin = self.settings.pinned_id
        if pin is not None and snapshot.id != pin:
            raise SnapshotError(
                f"{name} holds snapshot {snapshot.id}, expected the pinned {pin}; "
                "name a file with it in TILEWISE_SNAPSHOT (`tilewise snapshot export FILE --of ID` writes one), "
                "or pin the new id"
            )
        return verify(snapshot, self.settings.key, name=name)

    # The background thread, and what it calls

    def follow(self, *, failed: bool) -> None:
        """Let the background thread look after a remote source from now on; soon, where it just failed."""
        if not self._source.local:
            background.follow(self, failed=failed)

    def revalidate(self) -> None:
        """Bring the download on disk up to date and tell what was used; the answers of this run stay as they are.

        Raises what the source raises.
        """
        limit = self.settings.timeout
        if self.settings.pinned_id is None:
            snapshot = self._ask(self._source, limit, self._cached())
            self._cache.store(snapshot, *self._cache_key())
            if self._table is not None and snapshot.id != self._table.snapshot_id:
                log.info(
                    "%s has newer answers (%s): tilewise.refresh() takes them", self._source.name, snapshot.id[:12]
                )
        self.report(timeout=limit)

    def report(self, *, timeout: float) -> None:
        """Tell the source what was used and missed since the last time. Raises SourceError."""
        table = self._table
        for usage, counts in self._usage.batches(self.device_key, None if table is None else table.snapshot_id):
            within(timeout, lambda usage=usage: self._source.report(usage, timeout=timeout), name=self._source.name)  # type: ignore[misc]
            Recorder.told(counts)

    def _cache_key(self) -> tuple[str, str, str]:
        return self._source.name, self.device_key, self.settings.pinned_id or self.settings.pinned_channel or ""

    def _pinned_here(self) -> Snapshot | None:
        """Return the snapshot whose id is pinned, from the disk cache: what an id names never changes."""
        return None if self.settings.pinned_id is None or self._source.local else self._cached()

    def _fallback(self) -> tuple[Snapshot, str]:
        """Return what there is when the source failed and nothing is pinned, and what to call it."""
        cached = None if self._source.local else self._cached()
        if cached is not None:
            return cached, f"the last download from {self._source.name} ({cached.id[:12]})"
        if self._source is not self._embedded:
            try:
                embedded = self._ask(self._embedded, self.settings.timeout)
            except _TROUBLE as error:
                log.info("the embedded snapshot is not used: %s", error)
            else:
                if embedded.answers:
                    return embedded, f"the embedded snapshot ({embedded.id[:12]})"
        return Snapshot(()), "the default answers"

    def _seal_local(self) -> SealedTable:
        """Seal what this machine holds, without asking a remote source; the default where that fails."""
        origin = "the default answers"
        snapshot = Snapshot(())
        if self._source.local:
            try:
                snapshot, origin = self._ask(self._source, self.settings.timeout), self._source.name
            except _TROUBLE as error:
                log.warning("%s. This run goes on with %s.", error, origin)
        else:
            cached = self._cached()
            if cached is not None:
                snapshot, origin = cached, f"the last download from {self._source.name}"
        with self._sealing:
            if self._table is None:  # another thread may have been faster
                self._table = SealedTable(snapshot, self.device_key, self.software, origin=origin)
            return self._table


_clients: "weakref.WeakSet[Client]" = weakref.WeakSet()


def _after_fork() -> None:
    """Give every client of a forked child new locks: the thread that held one lives only in the parent."""
    for client in list(_clients):
        client._reset_locks()
        client._usage.forget()


os.register_at_fork(after_in_child=_after_fork)

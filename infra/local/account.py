"""The account that Postgres runs as: ours, or an unprivileged one if we are root, which Postgres refuses."""

import os
import pwd
import subprocess
from dataclasses import dataclass
from pathlib import Path

UNPRIVILEGED_ACCOUNTS = ("nobody", "postgres", "daemon")


@dataclass(frozen=True, slots=True)
class Account:
    """A user of this machine; `switch` says whether a process must change to it."""

    name: str
    uid: int
    gid: int
    switch: bool

    def can_enter(self, folder: Path) -> bool:
        """Whether this account can list `folder`, which also needs access to every parent folder."""
        command = ["/bin/sh", "-c", 'test -r "$1" && test -x "$1"', "sh", str(folder)]
        return self.run(command).returncode == 0

    def run(self, command: list[str]) -> subprocess.CompletedProcess[str]:
        """Run a short command as this account; stderr joins stdout. Does not raise on a nonzero exit status."""
        return subprocess.run(  # noqa: S603 - our own programs
            command,
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            user=self.uid if self.switch else None,
            group=self.gid if self.switch else None,
            extra_groups=[] if self.switch else None,
        )

    def owns(self, path: Path) -> bool:
        return path.stat().st_uid == self.uid

    def take_over(self, folder: Path) -> None:
        """Make this account the owner of `folder` and everything below it; works only as root."""
        for path in (folder, *folder.rglob("*")):
            os.chown(path, self.uid, self.gid, follow_symlinks=False)


def server_account() -> Account | None:
    """The account that the server runs as; None if we are root and this machine has no unprivileged account."""
    uid = os.geteuid()
    if uid != 0:
        return Account(str(uid), uid, os.getegid(), switch=False)
    known = {entry.pw_name: entry for entry in pwd.getpwall()}
    entries = (known[name] for name in UNPRIVILEGED_ACCOUNTS if name in known)
    return next((Account(e.pw_name, e.pw_uid, e.pw_gid, switch=True) for e in entries), None)

"""The account that Postgres runs under: ours, or an unprivileged one when we are root, which Postgres refuses."""

import os
import pwd
import subprocess
from dataclasses import dataclass
from pathlib import Path

UNPRIVILEGED_ACCOUNTS = ("nobody", "postgres", "daemon")


@dataclass(frozen=True, slots=True)
class Account:
    """A user of this machine; `switch` tells whether a process has to change to it."""

    name: str
    uid: int
    gid: int
    switch: bool

    def can_enter(self, folder: Path) -> bool:
        """Whether this account can list `folder`, which asks every parent folder to let it through."""
        command = ["/bin/sh", "-c", 'test -r "$1" && test -x "$1"', "sh", str(folder)]
        return self.run(command).returncode == 0

    def run(self, command: list[str]) -> subprocess.CompletedProcess[str]:
        """Run a short command as this account, without raising on a bad exit status; stderr joins stdout."""
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
        """Make this account the owner of `folder` and all below; only root can."""
        for path in (folder, *folder.rglob("*")):
            os.chown(path, self.uid, self.gid, follow_symlinks=False)


def server_account() -> Account | None:
    """Who the server runs as; None when we are root and this machine knows no unprivileged account."""
    uid = os.geteuid()
    if uid != 0:
        return Account(str(uid), uid, os.getegid(), switch=False)
    known = {entry.pw_name: entry for entry in pwd.getpwall()}
    entries = (known[name] for name in UNPRIVILEGED_ACCOUNTS if name in known)
    return next((Account(e.pw_name, e.pw_uid, e.pw_gid, switch=True) for e in entries), None)

"""Run as a script: become a server that ends together with the process that started it.

Arguments: the parent's pid, the death signal, the account to run as ("-" keeps ours), the program, its arguments.

A script, because `subprocess`'s `preexec_fn` is unsafe in a program with threads. The order is account, signal, `exec`
(which keeps the pid), because the kernel clears the parent-death signal when the account changes.
"""

import ctypes
import os
import pwd
import sys

PR_SET_PDEATHSIG = 1


def main() -> None:
    parent_pid, death_signal, account, *command = sys.argv[1:]
    if account != "-":
        become(account)
    if sys.platform == "linux":
        die_with_parent(int(parent_pid), int(death_signal))
    os.execv(command[0], command)  # noqa: S606 - our own programs


def become(account: str) -> None:
    """Give up root permanently."""
    entry = pwd.getpwnam(account)
    os.setgroups([])
    os.setgid(entry.pw_gid)
    os.setuid(entry.pw_uid)


def die_with_parent(parent_pid: int, death_signal: int) -> None:
    """Ask Linux for `death_signal` when the parent *thread* that started us ends; exit if it has ended already."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, death_signal, 0, 0, 0)
    if os.getppid() != parent_pid:
        sys.exit("the process that started this server has ended")


if __name__ == "__main__":
    main()

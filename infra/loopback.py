"""This machine, as an address names it: what is sent there nobody else reads on the way."""

from typing import Final

LOOPBACK: Final = ("127.0.0.1", "localhost", "::1")

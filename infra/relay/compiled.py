"""Whether the relay's inner loop, `native.pyx`, was compiled for this Python: `make venv` compiles it where it can."""

from importlib.util import find_spec
from typing import Final

IS_COMPILED: Final = find_spec("infra.relay.native") is not None

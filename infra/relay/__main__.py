"""A bare relay, configured by the environment, for tests that kill it; operators run `payments relay`."""

import asyncio
import json
import os
import signal

from infra.kafka.access import KafkaAccess
from infra.last_resort import end_within
from infra.relay import Relay, RelayConfig


async def main() -> None:
    """Relay until SIGTERM or SIGINT. `RELAY_CONFIG` has the fields of `RelayConfig` as JSON, without passwords."""
    fields = json.loads(os.environ["RELAY_CONFIG"])
    config = RelayConfig(**fields | {"kafka": KafkaAccess(**fields["kafka"])})
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def end() -> None:
        stop.set()
        end_within(config.end_seconds)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, end)
    await Relay(config).run(stop)


if __name__ == "__main__":
    asyncio.run(main())

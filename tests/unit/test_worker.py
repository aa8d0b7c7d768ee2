"""What a worker says of itself before it works; how it works is in integration/test_consumer.py."""

from app.health import troubles
from app.settings import Settings
from app.worker import Worker


async def test_a_worker_that_has_not_started_says_so_of_each_of_its_parts() -> None:
    checks = Worker(Settings()).checks()
    assert await troubles(checks) == dict.fromkeys(checks, "starting")

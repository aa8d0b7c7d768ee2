"""What `payments up` prints may be copied from the terminal to anywhere, so it shows no password."""

import pytest

from app.up_report import without_password


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://postgres@127.0.0.1:5432/payments", "postgresql://postgres@127.0.0.1:5432/payments"),
        ("postgresql://127.0.0.1:5432/payments", "postgresql://127.0.0.1:5432/payments"),
        ("postgresql://app:geheim@a:5432,b:5432/payments", "postgresql://app:***@a:5432,b:5432/payments"),
        (
            "postgresql://h/p?user=app&password=geheim&sslmode=require",
            "postgresql://h/p?user=app&password=***&sslmode=require",
        ),
    ],
)
def test_a_databases_url_is_shown_without_its_password(url: str, shown: str) -> None:
    assert without_password(url) == shown

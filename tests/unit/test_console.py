"""Text that comes from outside is shown on a terminal unchanged, and neither terminal nor shell executes it."""

import io
import subprocess

import pytest
from rich.console import Console
from rich.text import Text

from app.console import new_console, safe_lines, safe_text, shell_word
from app.tables import print_wide, table_of

FOREIGN = "refund-77[a] [/x] order:ticket:77"


def test_text_that_looks_like_markup_or_an_emoji_is_printed_unchanged(capsys: pytest.CaptureFixture[str]) -> None:
    new_console().print(FOREIGN)
    new_console(to_stderr=True).print(Text(FOREIGN, "bold"))
    told = capsys.readouterr()
    assert (told.out, told.err) == (f"{FOREIGN}\n", f"{FOREIGN}\n")


def test_nothing_commands_a_terminal() -> None:
    assert safe_text("a\x1b[2J\r\n\x9b1A\u202e é") == r"a\x1b[2J\r\n\x9b1A\u202e é"
    assert safe_lines("a\x1b\n\tb") == "a\\x1b\n        b"


def test_a_cell_of_a_table_stays_on_its_line() -> None:
    file = io.StringIO()
    print_wide(Console(file=file, width=200), table_of(["order"], [[f"{FOREIGN}\n\x1b[31m"]], whole={"order"}))
    assert rf"{FOREIGN}\n\x1b[31m" in file.getvalue()


def test_ids_stay_whole_however_long_they_are_and_no_word_beside_them_is_broken() -> None:
    file = io.StringIO()
    ids = [f"{letter} id " * 40 for letter in "abcd"]
    table = table_of([*"abcd", "why"], [[*ids, "some words " * 60]], whole=set("abcd"))
    print_wide(Console(file=file, width=80), table)
    assert all(each.strip() in file.getvalue() for each in ids)
    assert file.getvalue().count("words") == 60


@pytest.mark.parametrize("word", ["refund-77", "refund 77[a]", "it's $HOME", "\x1b it's\n\\x \x85\u202e €"])
def test_a_word_to_be_copied_is_read_back_by_a_shell(word: str) -> None:
    quoted = shell_word(word)
    assert quoted.isprintable()
    done = subprocess.run(["bash", "-c", f"printf %s {quoted}"], capture_output=True, check=True)
    assert done.stdout.decode() == word

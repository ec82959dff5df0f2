"""What a person may write for a size of memory, and what is no size."""

import pytest

from cpcompile.cli.sizes import parse_size
from cpcompile.core.errors import UsageError


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1", 1),
        ("800b", 800),
        ("2GB", 2 * 10**9),
        ("2 gb", 2 * 10**9),
        ("2g", 2 * 10**9),
        ("1500MiB", 1500 * 2**20),
        (" 1.5GB ", 1_500_000_000),
        ("2Gi", 2**31),
        ("0.5k", 500),
        ("3TiB", 3 * 2**40),
        ("999999999999999999TiB", 999_999_999_999_999_999 * 2**40),
        ("9007199254740993", 2**53 + 1),  # no float has it
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    [
        *["", " ", "0", "0GB", "0.4", "-1GB", "+1GB", "1e9", "inf", "nan", "GB", "1.GB", ".5GB", "1PB", "1iB", "1GBs"],
        *["1,5GB", "1 000MB", "0x10", "١GB", "1GB\n2GB", "9" * 400 + "GB", "9" * 5000, "1." + "3" * 5000],
    ],
)
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is not a memory size; write it like 800MB, 1.5GB or 2GiB") as refused:
        parse_size(text)
    assert len(str(refused.value)) < 120

"""Lines of text in twelve scripts, for comparing tokenizers: real text where the machine has it, and made-up words."""

from __future__ import annotations

import functools
import random
import sysconfig
from itertools import chain
from pathlib import Path

SCRIPTS = {
    "Latin": [(0x41, 0x5A), (0x61, 0x7A), (0xC0, 0x17F)],
    "Greek": [(0x391, 0x3A1), (0x3A3, 0x3C9)],
    "Cyrillic": [(0x410, 0x44F), (0x400, 0x45F)],
    "Hebrew": [(0x5D0, 0x5EA), (0x5B0, 0x5BC)],
    "Arabic": [(0x621, 0x64A), (0x64B, 0x652), (0x660, 0x669)],
    "Devanagari": [(0x904, 0x939), (0x93E, 0x94D), (0x966, 0x96F)],
    "Thai": [(0xE01, 0xE30), (0xE31, 0xE4D), (0xE50, 0xE59)],
    "Georgian": [(0x10D0, 0x10F0)],
    "Hangul": [(0xAC00, 0xD7A3)],
    "Kana": [(0x3041, 0x3096), (0x30A1, 0x30FA)],
    "Han": [(0x4E00, 0x9FA5)],
    "signs": [(0x21, 0x40), (0x2010, 0x2044), (0x1F300, 0x1F64F), (0x200B, 0x200F), (0xFE0F, 0xFE0F), (0x300, 0x345)],
}
BETWEEN = [*[" "] * 4, "  ", "   ", "\t", "\r", "\x0b", "\u00a0", "\u2028", "\u3000", "'s ", "'", "-", ", ", ". ", "7"]


def made_up(rng: random.Random) -> str:
    """A line of words of one script, or of several."""
    names = rng.choices(list(SCRIPTS), k=rng.choice((1, 1, 1, 2, 3)))
    text = ""
    for _ in range(rng.randrange(1, 14)):
        low, high = rng.choice(SCRIPTS[rng.choice(names)])
        text += "".join(chr(rng.randint(low, high)) for _ in range(rng.randrange(1, 9)))
        text += str(rng.randrange(10**5)) if rng.random() < 0.1 else ""
        text += rng.choice(BETWEEN)
    return text


@functools.cache
def real() -> list[str]:
    """The lines of the standard library's sources, and of the translations that the machine has."""
    library = Path(sysconfig.get_path("stdlib"))
    sources = sorted(
        chain(library.glob("*.py"), library.glob("test/test_u*.py"), Path("/usr/share/doc").rglob("*.txt"))
    )
    texts = [path.read_text(encoding="utf-8", errors="ignore") for path in sources if path.is_file()]
    return [line for text in texts for line in text.splitlines(keepends=True)]


def lines(count: int, seed: int = 0) -> list[str]:
    """A third of real text, the rest made up."""
    rng = random.Random(seed)
    found = real()
    taken = rng.sample(found, min(len(found), count // 3))
    return taken + [made_up(rng) for _ in range(count - len(taken))]

"""Show the examples in the help of commands as code: mkdocs-click loses the mark by which click keeps their lines."""

from __future__ import annotations

import re
from typing import Any

EXAMPLES = re.compile(r"<p>((?:cpcompile |[^<\n]+:\n  ).*?)</p>", re.DOTALL)
"""A paragraph of commands, or a title and indented lines."""


def on_page_content(html: str, *, page: Any, **_: Any) -> str:
    """Called by MkDocs with the HTML of every page."""
    if page.file.src_uri != "reference/commands.md":
        return html
    return EXAMPLES.sub(lambda found: f"<pre><code>{re.sub('</?code>', '`', found[1])}</code></pre>", html)

"""An application with three contexts: it finds out which of them a text belongs to, and lets that one continue it.

python examples/python/three_contexts.py model.cpc english python cpp --text "def area(width, height):"

All engines are in one process, where the weights that contexts share are in memory once. A text belongs to the context
under which it is the most likely.
"""

from __future__ import annotations

from pathlib import Path

import click

from cpcompile.runtime import load_all


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path, exists=True))
@click.argument("contexts", nargs=3)
@click.option("--text", default="Return the number of ", show_default=True, help="What is continued.")
@click.option("--tokens", default=40, show_default=True, help="At most so many tokens are added.")
def main(bundle: Path, contexts: tuple[str, ...], text: str, tokens: int) -> None:
    """Continue a text with that of three CONTEXTS of BUNDLE which fits it best."""
    with load_all(bundle) as engines:
        # The sum and not the mean per token, because contexts may have vocabularies of their own.
        fit = {context: engines[context].score(text).log_likelihood for context in contexts}
        for context in sorted(fit, key=fit.__getitem__, reverse=True):
            click.echo(f"{context:<12} log likelihood {fit[context]:.1f}")
        click.echo(text, nl=False)
        for piece in engines[max(fit, key=fit.__getitem__)].generate(text, max_new_tokens=tokens, stream=True):
            click.echo(piece, nl=False)
        click.echo()


if __name__ == "__main__":
    main()

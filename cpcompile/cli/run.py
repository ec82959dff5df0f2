"""`cpcompile run`: what an engine writes after a prompt."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from cpcompile.cli.options import FilePath


@click.command(context_settings={"show_default": True})
@click.argument("bundle", type=FilePath)
@click.argument("prompt")
@click.option("--context", "-c", help="The context.  [default: the only one]")
@click.option(
    "--variant",
    default="best",
    help="Engine to run; best: a GPU's if one runs here, else what --target best chose, else cpu-fp32.",
)
@click.option("--max-new-tokens", "-n", type=int, default=128, help="Most tokens to write.")
@click.option("--temperature", type=float, default=0.0, help="0 for the most likely tokens; about 0.8 for variety.")
@click.option("--top-k", type=int, default=0, help="Sample from the N most likely tokens; 0 for all.")
@click.option("--top-p", type=float, default=1.0, help="Choose among the tokens that make up this probability.")
@click.option("--repetition-penalty", type=float, default=1.0, help="Above 1, tokens that occurred become less likely.")
@click.option("--stop", multiple=True, metavar="TEXT", help="End before this text; repeatable.")
@click.option("--seed", type=int, help="Samples with the same seed are the same.")
@click.option("--threads", type=int, default=0, help="0 leaves the number to ONNX Runtime.")
@click.option("--score", is_flag=True, help="Print the perplexity of PROMPT instead of continuing it.")
def run(
    bundle: Path,
    prompt: str,
    context: str | None,
    variant: str,
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    repetition_penalty: float,
    stop: tuple[str, ...],
    seed: int | None,
    threads: int,
    score: bool,
) -> None:
    """Print what the engine of a context writes after PROMPT, piece by piece; a PROMPT of - reads standard input.

    \b
    Examples:
      cpcompile run model.cpc --context english "Return the "
      cpcompile run model.cpc -c python "def main(" -n 40 --temperature 0.8 --seed 1
      cpcompile run model.cpc -c english - --score < page.txt
    """
    from cpcompile.runtime import load

    text = sys.stdin.buffer.read().decode(errors="replace") if prompt == "-" else prompt
    engine = load(bundle, context, variant, threads=threads)
    if score:
        found = engine.score(text)
        click.echo(f"perplexity {found.perplexity:.4g} over {found.tokens:,} tokens")
        return
    pieces = engine.generate(
        text,
        max_new_tokens=max_new_tokens,
        stream=True,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        repetition_penalty=repetition_penalty,
        stop=stop,
        seed=seed,
    )
    for piece in pieces:
        click.echo(piece, nl=False)
        sys.stdout.flush()
    click.echo()

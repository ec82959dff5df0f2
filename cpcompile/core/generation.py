"""What a program that generates text has to know of a language model besides its graph and its tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from cpcompile.core.coercion import coerce


@dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """Token ids are those of the engine: of a trimmed vocabulary, where it was trimmed."""

    end: tuple[int, ...] = ()
    """A text is complete after any of them."""
    leading: tuple[int, ...] = ()
    """They stand in front of every text, such as that of a BOS token."""
    context_length: int | None = None
    """Tokens that the model reads at most; None if its positions have no limit."""
    chat_template: str | None = None
    """A Jinja template that makes a prompt of messages, as Hugging Face writes it."""

    def renumbered(self, new_ids: Mapping[int, int]) -> GenerationSettings:
        """The same for a trimmed vocabulary; new_ids: old id -> new id, of the tokens that are left."""
        end, leading = (tuple(new_ids[i] for i in ids if i in new_ids) for ids in (self.end, self.leading))
        return replace(self, end=end, leading=leading)

    def to_plain(self) -> dict[str, Any]:
        """The form in which a bundle records it."""
        return asdict(self) | {"end": list(self.end), "leading": list(self.leading)}

    @staticmethod
    def from_plain(plain: Mapping[str, Any]) -> GenerationSettings:
        """Read what `to_plain` gave; UsageError or TypeError if it is something else."""
        return GenerationSettings(
            end=coerce(plain["end"], tuple[int, ...], "end"),
            leading=coerce(plain["leading"], tuple[int, ...], "leading"),
            context_length=coerce(plain["context_length"], int | None, "context_length"),
            chat_template=coerce(plain["chat_template"], str | None, "chat_template"),
        )

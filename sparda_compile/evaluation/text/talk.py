"""A talk about a document that a model holds by itself, reading everything: greedy answers.

    opening | document | question | answer | question | answer ...
    one cache; each turn reads the tokens that are new, and writes its answer token by token

Turns are in the tokenizer's chat template; a tokenizer without one gets the words `User:` and
`Assistant:`.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Final

import torch
from transformers import DynamicCache, GenerationConfig

from sparda_compile.capture.cache_name import CACHE_NAME
from sparda_compile.errors import ConfigError
from sparda_compile.evaluation.reading import Reading
from sparda_compile.evaluation.text.documents import token_ids
from sparda_compile.evaluation.text.frame import answer_ends, opening_ids, turn_frame

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from sparda_compile.evaluation.text.documents import Document

__all__ = ["Talk", "hold_talk"]

# Between the document and the first question.
_PAUSE: Final = "\n\n"


@dataclasses.dataclass(frozen=True)
class Talk:
    """What was said, and what the model has in its cache of it.

    Attributes:
        ids_1T: [1, T] int64 tokens, those of the last answer included.
        answers: Where the tokens of each answer begin and end; what ends an answer is none of it.
        reading: Keys and values of all of them.
    """

    ids_1T: Tensor
    answers: tuple[tuple[int, int], ...]
    reading: Reading


@torch.no_grad()
def hold_talk(
    model: Any,
    tokenizer: Any,
    document: Document,
    begin: list[int],
    questions: Sequence[str],
    lengths: tuple[int, int],
    say: Callable[[str], None],
) -> Talk:
    """Ask a model about a document, one question after the other.

    Args:
        model: A causal LM of transformers in eval mode, on any device.
        tokenizer: Of the model.
        document: Cut so that there are as many tokens before the first answer as `lengths` says.
        begin: What the tokenizer puts before a text.
        questions: One or more.
        lengths: Tokens before the first answer, and of each answer at most.
        say: Told what is being done.

    Raises:
        ConfigError: If there are fewer tokens before the first answer than the first question has,
            or than a short document leaves, the model has too few positions, or the chat template
            leaves out what was said before.
    """
    num_tokens, most = lengths
    frame = turn_frame(tokenizer)
    opening = opening_ids(tokenizer, frame, begin)
    before = (_PAUSE, *[frame.to_user] * (len(questions) - 1))
    asked = [
        token_ids(tokenizer, f"{first}{question}{frame.to_assistant}")
        for first, question in zip(before, questions, strict=True)
    ]
    room = num_tokens - len(opening) - len(asked[0])
    if not 0 < room <= len(document.ids_T):
        raise ConfigError(
            f"tokens={num_tokens} leaves {room} for a document of {len(document.ids_T)}; use "
            f"{num_tokens - room + 1} to {num_tokens - room + len(document.ids_T)}."
        )
    _check_positions(model, num_tokens + sum(map(len, asked[1:])) + most * len(questions))
    device = next(model.parameters()).device
    ends = sorted(answer_ends(model, tokenizer))
    # One token more: it ends the answer, or is beyond the limit, and is fed to nobody.
    config = GenerationConfig(
        max_new_tokens=most + 1,
        do_sample=False,
        eos_token_id=ends or None,
        pad_token_id=ends[0] if ends else None,
    )
    cache = DynamicCache()
    named: dict[str, Any] = {CACHE_NAME: cache}
    ids = [*opening, *document.ids_T[:room].tolist()]
    answers = []
    for question, words in zip(questions, asked, strict=True):
        say(f"{document.name}: {question}")
        ids_1T = torch.tensor([[*ids, *words]], device=device)
        mask = torch.ones_like(ids_1T)
        written = model.generate(ids_1T, attention_mask=mask, generation_config=config, **named)
        ids = written[0, :-1].tolist()
        answers.append((ids_1T.shape[1], len(ids)))
    return Talk(torch.tensor([ids], device=device), tuple(answers), Reading.of(cache))


def _check_positions(model: Any, num_tokens: int) -> None:
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and num_tokens > positions:
        raise ConfigError(
            f"a talk of {num_tokens} tokens is longer than the {positions} positions that the "
            "model was made for; use fewer tokens, steps or questions."
        )

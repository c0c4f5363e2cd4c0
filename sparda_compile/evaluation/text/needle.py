"""A needle in a natural language: one sentence with a number, in running text of the documents.

    Remember the secret number in this text.

    <text> The secret number of Lisbon is 48213. <text>

    What is the secret number of Lisbon? The secret number of Lisbon is| 48213

Up to the last text it is a prompt. The question is fed step by step, so that it is read by decode
steps, and what counts are the digits. The needle stands at one of evenly spread depths, at the end
of a sentence. After "Needle in a Haystack" (Kamradt, 2023).
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any, Final

import torch

from sparda_compile.errors import ConfigError
from sparda_compile.evaluation.text.documents import Documents, token_ids
from sparda_compile.evaluation.text.filler import Filler, continuation
from sparda_compile.evaluation.text.scripts import Part, Script

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["needle_scripts"]

_PLACES: Final = (
    "Lisbon",
    "Oslo",
    "Vienna",
    "Cairo",
    "Lima",
    "Quito",
    "Kyoto",
    "Delhi",
    "Paris",
    "Rome",
)
_TASK: Final = "Remember the secret number in this text.\n\n"


def needle_scripts(
    tokenizer: Any, documents: Documents, length: int, *, trials: int, depths: int, seed: int
) -> list[Script]:
    """Make samples.

    Args:
        tokenizer: Of the model.
        documents: Whose text is the haystack.
        length: Tokens of each sample, question and answer included.
        trials: Samples.
        depths: Places of the needle, from the first to the last sentence; trial t has depth
            t % depths.
        seed: Decides numbers, places and texts.

    Raises:
        ConfigError: If the length leaves no room for text, or the documents are too short.
    """
    made = []
    for trial in range(trials):
        generator = random.Random(f"needle {seed} {length} {trial}")
        share = (trial % depths) / (depths - 1) if depths > 1 else 0.5
        made.append(_script(tokenizer, documents, length, trial, share, generator))
    return made


def _script(
    tokenizer: Any,
    documents: Documents,
    length: int,
    trial: int,
    depth: float,
    generator: random.Random,
) -> Script:
    place, number = generator.choice(_PLACES), str(generator.randint(10000, 99999))
    begun = f"\n\nWhat is the secret number of {place}? The secret number of {place} is"
    question, answer = continuation(tokenizer, begun, f" {number}")
    needle = token_ids(tokenizer, f" The secret number of {place} is {number}. ")
    task = documents.begin + token_ids(tokenizer, _TASK)
    # The last token of the answer is predicted, and fed to nobody.
    room = length - len(task) - len(needle) - len(question) - len(answer)
    if room < len(needle):
        raise ConfigError(
            f"length={length} leaves {max(room, 0)} tokens of text around a needle; use "
            f"{length - room + len(needle)} or more."
        )
    filler = Filler(tokenizer, documents.each, generator, room)
    text = filler.take(room)
    cut = min(filler.cut(text, round(depth * room)), room)
    haystack = [*task, *text[:cut], *needle, *text[cut:]]
    parts = (
        Part(_row(haystack)),
        Part(_row([*question, *answer[:-1]]), _row(answer)),
    )
    name = f"needle {trial}"
    return Script(name, parts, (f"{100 * depth:.0f}%",))


def _row(ids: Sequence[int]) -> torch.Tensor:
    return torch.tensor([ids])

"""Recording the blocks that a model selects on documents and in talks: traces for benchmarks.

What comes before is read densely; then come decode steps in plain PyTorch (`evaluation/decode.py`),
each of which reads the blocks that its query selects:

    document    one run of steps, fed with the document's own tokens
    talk        a run for each answer, fed with what the model wrote when it read everything; before
                each, the cache is that of the model which read everything
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from sparda_compile.errors import ConfigError
from sparda_compile.evaluation.decode import decode
from sparda_compile.evaluation.reading import read
from sparda_compile.evaluation.text.talk import Talk
from sparda_compile.traces import Recording

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from torch import Tensor

    from sparda_compile.config import SpardaConfig
    from sparda_compile.evaluation.text.documents import Document

    # By share of the blocks: a configuration for each selector.
    Configs: TypeAlias = Mapping[float, Sequence[SpardaConfig]]

__all__ = ["check_choices", "record_document", "record_talk"]


class _Recorder:
    """Takes what each layer's query chose; stands where `decode` has counts of guesses."""

    def __init__(self, config: SpardaConfig) -> None:
        self._config = config
        self._steps: dict[int, list[Tensor]] = {}

    def begin(self) -> None:
        """Forget everything."""
        self._steps.clear()

    def add(
        self, number: int, scores: Mapping[str, Tensor], read_BGN: Tensor, lengths_B: Tensor
    ) -> None:
        """Keep the ids that a layer chose beyond those always read; B is 1."""
        del scores
        config = self._config
        block_N = torch.arange(read_BGN.shape[-1], device=read_BGN.device)
        last = int(lengths_B[0]) // config.block_size - config.local_blocks
        chosen_GN = read_BGN[0] & (block_N >= config.sink_blocks) & (block_N < last)
        ids = torch.where(chosen_GN)[1]
        self._steps.setdefault(number, []).append(ids.view(len(chosen_GN), -1).cpu())

    def ids(self, num_blocks: int) -> Tensor:
        """Return [L, S, G, K], uint8 where that holds every id."""
        dtype = torch.uint8 if num_blocks <= 256 else torch.int16
        layers = [torch.stack(steps) for _, steps in sorted(self._steps.items())]
        return torch.stack(layers).to(dtype)


@torch.no_grad()
def record_document(
    model: Any,
    document: Document,
    begin: Sequence[int],
    configs: Configs,
    num_tokens: int,
    num_steps: int,
    say: Callable[[str], None],
) -> Iterator[Recording]:
    """Yield what selectors choose on a document; the first tokens are read once for all of them.

    Args:
        model: A causal LM of transformers built like Llama, in eval mode.
        document: Of as many tokens as are read, or more.
        begin: What the tokenizer puts before a text.
        configs: By share of the blocks: one for each selector, with its budget that
            `check_choices` has nothing against.
        num_tokens: Tokens before the first step.
        num_steps: Decode steps.
        say: Told what is being done.

    Raises:
        UnsupportedInputError: If the model is not built like Llama.
    """
    device = next(model.parameters()).device
    ids = [*begin, *document.ids_T[: num_tokens + num_steps - len(begin)].tolist()]
    ids_1T = torch.tensor([ids], device=device)
    say(f"{document.name}: reading {num_tokens} tokens")
    reading = read(model, ids_1T[:, :num_tokens])
    named = {"text": document.name, "sha256": document.sha256}
    runs = ((num_tokens, num_tokens + num_steps),)
    yield from _record(model, Talk(ids_1T, runs, reading), configs, named, say)


def record_talk(
    model: Any,
    document: Document,
    talk: Talk,
    configs: Configs,
    say: Callable[[str], None],
) -> Iterator[Recording]:
    """Yield what selectors choose while the answers of a talk are written.

    Args:
        model: The model that held the talk, built like Llama.
        document: What it was about.
        talk: What was said.
        configs: As for `record_document`.
        say: Told what is being done.

    Raises:
        ConfigError: If the answers have fewer than two tokens.
        UnsupportedInputError: If the model is not built like Llama.
    """
    counts = tuple(end - begin for begin, end in talk.answers)
    if sum(counts) < 2:
        raise ConfigError(
            f"the answers about {document.name} have {sum(counts)} tokens, and a trace is of 2 "
            "steps or more; ask other questions."
        )
    named = {"text": f"{document.name} (talk)", "sha256": document.sha256, "answers": counts}
    yield from _record(model, talk, configs, named, say)


def check_choices(configs: Configs, num_tokens: int) -> None:
    """Refuse budgets that leave nothing to choose, or choose more blocks than there are.

    Args:
        configs: By share of the blocks: one for each selector, with its budget.
        num_tokens: Tokens before the first step.

    Raises:
        ConfigError: If there is one.
    """
    for config in (each for same in configs.values() for each in same):
        free = num_tokens // config.block_size - config.local_blocks - config.sink_blocks
        if not config.top_k or config.top_k > free:
            chosen = "all" if config.top_k is None else config.top_k
            raise ConfigError(
                f"of the {free} blocks that may be chosen in {num_tokens} tokens, this budget "
                f"chooses {chosen}; a trace needs 1 to {free}. Change the budget or tokens."
            )


def _record(
    model: Any,
    talk: Talk,
    configs: Configs,
    named: Mapping[str, Any],
    say: Callable[[str], None],
) -> Iterator[Recording]:
    """Yield what selectors choose in runs of steps, each behind a reading of what is before it."""
    runs = [(begin, end) for begin, end in talk.answers if begin < end]
    for share, same in configs.items():
        for config in same:
            say(f"{named['text']}: {config.selector}, {share:.0%} of the blocks")
            last = (runs[-1][1] - 1) // config.block_size - config.local_blocks
            found = []
            for begin, end in runs:
                recorder: Any = _Recorder(config)
                before = talk.reading.before(begin)
                decode(model, before, talk.ids_1T[:, begin:end], config, guesses=recorder)
                found.append(recorder.ids(last))
            yield Recording(
                selector=config.selector,
                share=share,
                num_tokens=runs[0][0],
                sink_blocks=config.sink_blocks,
                num_free=last - config.sink_blocks,
                ids_LSGK=torch.cat(found, dim=1),
                **named,
            )

"""What `sparda train` learns from: documents, of which some are held out, a text or a data set."""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from typing import TYPE_CHECKING, Any

from sparda_compile.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

    from torch import Tensor

__all__ = ["DocumentBatches", "Sources", "read_batches"]


class _Bytes:
    """One id from 0 to 255 per byte of UTF-8, called as a tokenizer of transformers is."""

    bos_token_id = eos_token_id = None

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        del options
        return {"input_ids": list(text.encode("utf-8"))}


@dataclasses.dataclass(frozen=True)
class DocumentBatches:
    """Documents as batches.

    Attributes:
        batches: To learn from, [B, T] int64 each; training goes through them again and again.
        held_out: To measure, as many as were asked for or there are; empty if none is held out.
        num_documents: Documents to learn from.
        num_tokens: Their tokens.
        names: Of the documents that are held out.
    """

    batches: list[Tensor]
    held_out: list[Tensor]
    num_documents: int
    num_tokens: int
    names: list[str]

    def steps(self, tokens: int, per_step: int) -> int:
        """Return the steps in which so many tokens are learned from.

        Args:
            tokens: In all.
            per_step: Batches of a step, over all processes.
        """
        return math.ceil(tokens / (per_step * self.batches[0].numel()))

    def sentence(self, steps: int, per_step: int) -> str:
        """Say what there is, and how often training goes through it."""
        asked, there = steps * per_step, len(self.batches)
        rows, length = self.batches[0].shape
        epochs = f"{asked / there:.2f} times" if asked > there else f"{asked / there:.0%} of them"
        return (
            f"{self.num_documents} documents of {self.num_tokens} tokens, {len(self.names)} more "
            f"held out; {there * rows} sequences of {length} tokens, of which {asked * rows} are "
            f"asked for: {epochs}"
        )

    def plain(self) -> dict[str, Any]:
        """Return what there is, for JSON."""
        return {
            "documents": self.num_documents,
            "tokens": self.num_tokens,
            "sequences": sum(len(batch) for batch in self.batches),
            "held_out": self.names,
            "held_out_sequences": sum(len(batch) for batch in self.held_out),
        }


@dataclasses.dataclass(frozen=True)
class Sources:
    """Where a training finds its text, and how it is cut.

    Attributes:
        documents: Text files, and folders of them; empty for none.
        text: One text file.
        dataset: A data set on disk. Of the three, one is given.
        tokenizer: `bytes`, a folder with a tokenizer, or `smollm2`.
        length: Tokens of one sequence.
        batch_size: Sequences of one batch.
        share: Of the documents, to hold out; 0.0 for none.
        measured: Most batches of held-out documents.
        seed: Of what is held out, and of the order.
    """

    documents: tuple[Path, ...]
    text: Path | None
    dataset: Path | None
    tokenizer: str
    length: int
    batch_size: int
    share: float
    measured: int
    seed: int

    def read(self, say: Callable[[str], None]) -> DocumentBatches | Iterable[Tensor]:
        """Return the batches.

        Args:
            say: Told what is being done.

        Raises:
            ConfigError: If there is no such file, not one source is given, or it is too short.
            BackendUnavailableError: If what reads it is not installed.
        """
        given = (bool(self.documents), self.text is not None, self.dataset is not None)
        if sum(given) != 1:
            raise ConfigError(
                "what to train on is missing or given twice; pass --document, --text or --dataset."
            )
        from sparda_compile.training.data import load_dataset, text_batches

        if self.documents:
            say("reading documents")
            return read_batches(self)
        tokenize = self._tokenize()
        sizes = {"length": self.length, "batch_size": self.batch_size}
        if self.text is not None:
            return text_batches(self.text, tokenize, **sizes)
        assert self.dataset is not None
        return load_dataset(self.dataset, tokenize, **sizes)

    def _tokenize(self) -> Callable[[str], Sequence[int]]:
        from pathlib import Path

        from sparda_compile.cli.real_model import REAL_MODEL, load_real_tokenizer
        from sparda_compile.evaluation.text.documents import token_ids
        from sparda_compile.training.data import load_tokenizer

        if self.tokenizer != REAL_MODEL or Path(REAL_MODEL).is_dir():
            return load_tokenizer(self.tokenizer)
        return partial(token_ids, load_real_tokenizer())


def read_batches(sources: Sources) -> DocumentBatches:
    """Read documents and pack them.

    Args:
        sources: With documents.

    Raises:
        ConfigError: If a file is no text, or they are too few for the lengths.
    """
    from sparda_compile.cli.targets import load_tokenizer
    from sparda_compile.evaluation.text.documents import read_documents
    from sparda_compile.training.packing import held_out_documents, packed_batches

    name = sources.tokenizer
    tokenizer = _Bytes() if name == "bytes" else load_tokenizer(name)
    documents = read_documents(sources.documents, tokenizer, 1)
    chosen = held_out_documents(len(documents.each), sources.share, sources.seed)
    apart = [documents.each[number] for number in chosen]
    kept = [each for n, each in enumerate(documents.each) if n not in set(chosen)]
    end = tokenizer.eos_token_id
    pack = partial(
        packed_batches,
        separator=[*([] if end is None else [end]), *documents.begin],
        length=sources.length,
        batch_size=sources.batch_size,
        seed=sources.seed,
    )
    held_out: list[Tensor] = []
    if apart:
        try:
            held_out = pack([each.ids_T for each in apart])[: sources.measured]
        except ConfigError as error:
            raise ConfigError(f"{len(apart)} documents are held out. Of these, {error}") from error
    return DocumentBatches(
        pack([each.ids_T for each in kept]),
        held_out,
        len(kept),
        sum(len(each.ids_T) for each in kept),
        [each.name for each in apart],
    )

"""What `sparda eval text` is asked for, checked before the model is loaded, and measured."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparda_compile.cli.console import INTERRUPTED, fail
from sparda_compile.cli.devices import check_memory
from sparda_compile.cli.real_model import REAL_MODEL, real_file
from sparda_compile.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from sparda_compile.config import SpardaConfig
    from sparda_compile.evaluation.text.cases import Budget
    from sparda_compile.evaluation.text.documents import Documents
    from sparda_compile.evaluation.text.results import TextFile
    from sparda_compile.evaluation.text.run import TextPart

__all__ = ["TextRequest"]


@dataclasses.dataclass(frozen=True)
class TextRequest:
    """What is to be measured.

    Attributes:
        target: A folder with a model and its tokenizer, or `smollm2`.
        paths: Of documents: files, and folders of files.
        tasks: `perplexity`, `needle`, `chat`.
        lengths: Tokens of a sample.
        bases: A configuration for each mode, selector, hint and format of full blocks, without a
            budget.
        budgets: Of the blocks.
        prefills: What a prompt's tokens read: `dense`, `sparse`.
        oracle: Whether the oracle is measured at each budget.
        counts: `scored`, `trials`, `depths` and `seed`.
        forecast: File of Forecast weights.
    """

    target: str
    paths: tuple[Path, ...]
    tasks: tuple[str, ...]
    lengths: tuple[int, ...]
    bases: tuple[SpardaConfig, ...]
    budgets: tuple[Budget, ...]
    prefills: tuple[str, ...]
    oracle: bool
    counts: dict[str, int]
    forecast: Path | None

    def measure(
        self,
        device: torch.device,
        batch_size: int,
        json_file: Path | None,
        commit: str | None,
        say: Callable[[str], None],
    ) -> TextFile:
        """Measure what the file does not have, and save it as it comes.

        Args:
            device: Where to run.
            batch_size: Samples of one shape at once.
            json_file: Where records are kept; None keeps them nowhere.
            commit: Of this package, where it is not a git checkout.
            say: Told what is being done.

        Raises:
            ConfigError: If something that was asked for cannot be, as a text that is too short.
            BackendUnavailableError: If the real model is not installed.
        """
        from sparda_compile.cli.targets import load_target, load_tokenizer
        from sparda_compile.evaluation.text.documents import read_documents
        from sparda_compile.evaluation.text.oracle import oracle_selector
        from sparda_compile.evaluation.text.results import TextFile
        from sparda_compile.evaluation.text.run import TextEvaluation
        from sparda_compile.forecast.weights import load_forecast

        say("reading documents")
        tokenizer = load_tokenizer(self.target)
        least = max(self.lengths) if "perplexity" in self.tasks else 1
        documents = read_documents(self.paths, tokenizer, least)
        with oracle_selector() if self.oracle else contextlib.nullcontext():
            parts = self._parts(tokenizer, documents)
            say(f"loading {self.target}")
            model: Any = load_target(self.target)
            model = (model.float() if device.type == "cpu" else model).to(device)
            self._check(model.config, documents, min(batch_size, len(documents.each)), device)
            file = TextFile(json_file, self._head(model, documents, device), commit)
            weights = load_forecast(self.forecast) if self.forecast is not None else None
            try:
                TextEvaluation(model, weights, file, batch_size, say).measure(parts)
            except KeyboardInterrupt:
                fail(_stopped(file), INTERRUPTED)
        return file

    def _parts(self, tokenizer: Any, documents: Documents) -> list[TextPart]:
        from sparda_compile.evaluation.text.cases import make_cases
        from sparda_compile.evaluation.text.run import TextPart, make_scripts

        parts = []
        for length in self.lengths:
            cases = make_cases(self.bases, length, self.budgets, self.prefills, oracle=self.oracle)
            for task in self.tasks:
                scripts = make_scripts(task, tokenizer, documents, length, self.counts)
                parts.append(TextPart(task, length, scripts, cases))
        return parts

    def _check(
        self, config: Any, documents: Documents, batch_size: int, device: torch.device
    ) -> None:
        """Refuse what the model cannot take."""
        text = config.get_text_config()
        positions = getattr(text, "max_position_embeddings", None)
        longest = max(self.lengths)
        if positions is not None and longest > positions:
            raise ConfigError(
                f"length={longest} is more than the {positions} positions that the model was made "
                f"for; use {positions} or fewer."
            )
        largest = max(int(document.ids_T.max()) for document in documents.each)
        if largest >= text.vocab_size:
            raise ConfigError(
                f"the tokenizer gives token {largest}, and the model has {text.vocab_size}: it is "
                "not this model's; put the model's own tokenizer into its folder."
            )
        check_memory(config, batch_size, longest, device)

    def _head(self, model: Any, documents: Documents, device: torch.device) -> dict[str, Any]:
        """Return what decides the numbers of records, and names what they are about."""
        from sparda_compile.evaluation.text.results import digest_of

        is_real = self.target == REAL_MODEL and not Path(self.target).is_dir()
        source = real_file() if is_real else Path(self.target)
        base = self.bases[0]
        sizes: tuple[str, ...] = ("block_size", "sink_blocks", "local_blocks", "short_list")
        sizes += ("pool_size", "pool_stride")
        return {
            "model": {
                "name": source.resolve().stem if is_real else source.resolve().name,
                "class": type(model).__name__,
                "weights_sha256": digest_of(source),
                "dtype": str(model.dtype).removeprefix("torch."),
            },
            "documents": documents.plain(),
            "left_out": documents.left_out,
            "settings": {
                **self.counts,
                **{name: getattr(base, name) for name in sizes},
                "lowering": base.lowering,
                "device": str(device),
                "forecast_sha256": digest_of(self.forecast) if self.forecast is not None else None,
            },
        }


def _stopped(file: TextFile) -> str:
    if file.path is None:
        return "stopped; nothing was kept. With --json-file it is, and the same command goes on."
    return f"stopped; what was measured is in {file.path}, and the same command goes on from there."

"""A conversation over documents, on one cache: each turn reads the tokens that are new.

    opening | documents | question | answer | question | answer ...
    read once, kept in the cache            new tokens alone

What was said is a list of tokens, those that the model read and wrote, and is never put into tokens
a second time. The cache holds all of them, or all but the last one written. Text that a template
would change later, as the thoughts of earlier answers, stays as it was.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final

import torch
from transformers import GenerationConfig

from sparda_compile.api import optimize
from sparda_compile.capture.cache_name import CACHE_NAME
from sparda_compile.chat.streaming import AnswerStreamer, Stop
from sparda_compile.chat.turn import Ending, Turn
from sparda_compile.errors import ConfigError, DevicePoolFullError, HostPoolFullError
from sparda_compile.evaluation.text.documents import begin_ids, token_ids
from sparda_compile.evaluation.text.frame import Frame, answer_ends, template_frame

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    from sparda_compile.chat.settings import ChatSettings
    from sparda_compile.config import SpardaConfig
    from sparda_compile.module.cache import SpardaCache
    from sparda_compile.module.optimized import OptimizedModule

__all__ = ["Conversation", "frame_of"]

# Tokens beyond the text that are reserved, so that some turns fit without a larger cache.
_ROOM: Final = 4096
_PLAIN: Final = Frame("", "", "\n\n")
# Between documents, and behind the last one.
_PAUSE: Final = "\n\n"


def frame_of(tokenizer: Any, *, is_plain: bool) -> Frame:
    """Return what stands around questions and answers.

    Args:
        tokenizer: Of the model.
        is_plain: Whether they follow each other as plain text.

    Raises:
        ConfigError: If the tokenizer has no chat template, or one that forgets.
    """
    frame = _PLAIN if is_plain else template_frame(tokenizer)
    if frame is None:
        raise ConfigError(
            "the tokenizer has no chat template, so the model does not say how a question is told "
            "from an answer; use a model that was tuned for conversations, or add --plain to let "
            "it go on with plain text."
        )
    return frame


class Conversation:
    """A conversation with a model.

    Args:
        model: A causal LM in eval mode, on its device.
        tokenizer: Of the model.
        settings: What it is run with; `change` changes them.
        frame: What stands around questions and answers.
        forecast: Forecast weights by target layer, for modes that use them.

    Attributes:
        settings: What it is run with.
        ids: What was said so far, as tokens.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        settings: ChatSettings,
        frame: Frame,
        forecast: Mapping[int, Tensor] | None = None,
    ) -> None:
        self._model, self._tokenizer, self._forecast = model, tokenizer, forecast
        self._frame = frame
        self._is_plain = frame is _PLAIN
        self._documents: list[int] = []
        self._module: OptimizedModule | None = None
        self._cache: SpardaCache | None = None
        self._planned_tokens = 0
        self._num_turns = 0
        self.settings = settings
        self.ids: list[int] = self._opening()

    def read(self, documents: Sequence[Tensor]) -> str:
        """Begin with documents; returns a sentence that says what was read.

        Args:
            documents: Tokens of each, [T] int64, without special ones.

        Raises:
            ConfigError: If they are longer than the model's positions.
        """
        pause = token_ids(self._tokenizer, _PAUSE)
        self._documents = [
            token for place, each in enumerate(documents) for token in [*pause * bool(place), *each]
        ]
        self._documents = list(map(int, self._documents))
        return self.reset()

    def reset(self) -> str:
        """Forget all turns and read the documents again; returns a sentence that says so."""
        self._cache, self._num_turns = None, 0
        self.ids = self._opening()
        if not self._documents:
            return "nothing is left of the conversation"
        self._check_room(len(self.ids), self.settings.max_new_tokens, "the documents")
        return f"{self._read_all()} of documents read"

    def ask(self, question: str, show: Callable[[str], None], stop: Stop | None = None) -> Turn:
        """Answer a question.

        An exception, KeyboardInterrupt too, leaves the conversation as it was before; what the
        cache then holds is nobody's text, so the next turn reads everything again.

        Args:
            question: What the user says.
            show: Gets the answer in pieces, as it is written.
            stop: Ends the answer when it is told to: what was written until then has been said.

        Raises:
            ConfigError: If the model has no positions left for it.
        """
        prompt = [*self.ids, *token_ids(self._tokenizer, self._framed(question))]
        room = self._check_room(len(prompt), 1, "the conversation and the question")
        note = self._follow_growth(len(prompt))
        most = min(self.settings.max_new_tokens, room)
        streamer = AnswerStreamer(self._tokenizer, show)
        module, cache = self._ready(len(prompt))
        num_read = len(prompt) - cache.get_seq_length()
        if cache.kv is not None:
            cache.kv.reset_stats()
        stop = stop or Stop()
        try:
            self._generate(module, cache, prompt, most, streamer, stop)
        except BaseException:
            self._cache = None
            raise
        ends = self._ends()
        ending: Ending = "max_new_tokens" if most == self.settings.max_new_tokens else "positions"
        if streamer.ids[-1] in ends:
            ending = "end"
        elif stop.is_set:
            ending = "interrupted"
        # What ends an answer is the template's to write, at the beginning of the next turn.
        self.ids = [*prompt, *(streamer.ids[:-1] if ending == "end" else streamer.ids)]
        self._num_turns += 1
        return self._turn(question, streamer, ending, num_read, note)

    def change(self, **changes: Any) -> str:
        """Change settings; returns a sentence that says what became of the cache.

        Args:
            **changes: As of `ChatSettings.changed`.

        Raises:
            ConfigError: If a value is not allowed; nothing is changed then.
        """
        settings = self.settings.changed(**changes)
        text = self._use(settings.config(len(self.ids)))
        self.settings, self._planned_tokens = settings, len(self.ids)
        return text

    def stats(self) -> str:
        """Return what the cache did since the last question was asked, in lines."""
        if self._cache is None or self._cache.kv is None:
            return "nothing has been read yet"
        return str(self._cache.kv.stats())

    @property
    def config(self) -> SpardaConfig | None:
        """What the module in use was built for; None before anything was read."""
        return None if self._module is None else self._module.sparda_config

    @property
    def positions(self) -> int | None:
        """Tokens that the model was made for; None where it does not say."""
        config = self._model.config.get_text_config()
        return getattr(config, "max_position_embeddings", None)

    def _opening(self) -> list[int]:
        begin = begin_ids(self._tokenizer) if self._is_plain else []
        if not self._documents:
            return begin  # the frame's opening is put into tokens with the first question
        return [*begin, *token_ids(self._tokenizer, self._frame.opening), *self._documents]

    def _framed(self, question: str) -> str:
        before = self._frame.to_user
        if not self._num_turns:
            before = _PAUSE if self._documents else self._frame.opening
        return f"{before}{question}{self._frame.to_assistant}"

    def _check_room(self, num_tokens: int, least: int, what: str) -> int:
        """Return how many tokens an answer may have."""
        positions = self.positions
        if positions is None:
            return self.settings.max_new_tokens
        if num_tokens + least > positions:
            raise ConfigError(
                f"{what} and an answer have {num_tokens:,} + {least:,} tokens, and the model has "
                f"{positions:,} positions, {num_tokens + least - positions:,} fewer; "
                "name a shorter text, lower max_new_tokens, forget earlier turns, or take a model "
                "that was made for longer texts."
            )
        return positions - num_tokens

    def _use(self, config: SpardaConfig) -> str:
        """Go on with a configuration; returns what became of the cache."""
        if self._module is not None and self._module.sparda_config == config:
            return "nothing has to be built for it"
        weights = self._forecast if config.needs_forecast else None
        made_from = self._model if self._module is None else self._module
        module = optimize(made_from, config, forecast=weights)
        old, self._cache, before = self._cache, None, self._module
        self._module = module
        held = 0 if old is None else old.get_seq_length()
        if old is None or not held:
            return "the cache is empty"
        assert before is not None  # it owns the old cache
        self._cache = _taken_over(module, old, self._reserve(held))
        del old, before
        if self._cache is not None:
            return f"{held:,} tokens taken over from the cache"
        return f"there is no room for two caches: {self._read_all()} read again"

    def _follow_growth(self, num_tokens: int) -> str:
        """Let a share be that of the text as it is now, if it has grown to twice its length."""
        if self._module is None:
            self._use(self.settings.config(num_tokens))
        elif self.settings.budget is not None and num_tokens > 2 * self._planned_tokens:
            share = f"{100 * self.settings.budget:g}% of the blocks are more now"
            text = self._use(self.settings.config(num_tokens))
            self._planned_tokens = num_tokens
            return f"{share}: {text}"
        else:
            return ""
        self._planned_tokens = num_tokens
        return ""

    def _reserve(self, num_tokens: int) -> int:
        wanted = num_tokens + max(_ROOM, self.settings.max_new_tokens)
        return wanted if self.positions is None else max(num_tokens, min(wanted, self.positions))

    def _ready(self, num_tokens: int) -> tuple[OptimizedModule, SpardaCache]:
        assert self._module is not None
        if self._cache is None:
            self._cache = self._module.new_cache(self._reserve(num_tokens))
        return self._module, self._cache

    @torch.no_grad()
    def _read_all(self) -> str:
        """Read what was said into an empty cache; returns how much, and how long it took."""
        begin = time.perf_counter()
        self._follow_growth(len(self.ids))
        module, cache = self._ready(len(self.ids))
        named: dict[str, Any] = {CACHE_NAME: cache}
        try:
            module(torch.tensor([self.ids], device=module.device), logits_to_keep=1, **named)
        except BaseException:
            self._cache = None
            raise
        return f"{len(self.ids):,} tokens in {time.perf_counter() - begin:.1f} s"

    def _generate(
        self,
        module: OptimizedModule,
        cache: SpardaCache,
        prompt: list[int],
        most: int,
        streamer: AnswerStreamer,
        stop: Stop,
    ) -> None:
        ids = torch.tensor([prompt], device=module.device)
        ends = sorted(self._ends())
        module.generation_config = GenerationConfig(
            max_new_tokens=most,
            do_sample=False,
            eos_token_id=ends or None,
            pad_token_id=ends[0] if ends else None,
        )
        module.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            streamer=streamer,
            stopping_criteria=[stop],
            cache=cache,
        )

    def _ends(self) -> set[int]:
        return answer_ends(self._model, self._tokenizer)

    def _turn(
        self, question: str, streamer: AnswerStreamer, ending: Ending, num_read: int, note: str
    ) -> Turn:
        cache, module = self._cache, self._module
        assert cache is not None
        assert cache.kv is not None
        assert module is not None
        config, total = module.sparda_config, cache.kv.stats().total
        num_blocks = -(-cache.get_seq_length() // config.block_size)
        return Turn(
            question=question,
            answer=streamer.text,
            ending=ending,
            read_tokens=num_read,
            answer_tokens=len(streamer.ids),
            cache_tokens=cache.get_seq_length(),
            first_token_s=streamer.first_s,
            tokens_per_s=streamer.tokens_per_s,
            h2d_bytes=total.h2d_bytes,
            d2h_bytes=total.d2h_bytes,
            hit_rate=total.hit_rate,
            blocks_read=config.num_selected(num_blocks),
            blocks=num_blocks,
            note=note,
        )


def _taken_over(module: OptimizedModule, old: SpardaCache, num_tokens: int) -> SpardaCache | None:
    """Return a module's cache with what another one holds; None where there is no room for both."""
    try:
        return module.new_cache(num_tokens, past=old)
    except (HostPoolFullError, DevicePoolFullError):
        return None

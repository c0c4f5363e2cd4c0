from __future__ import annotations

import copy

import pytest
import torch

from sparda_compile import SpardaConfig, optimize
from sparda_compile.chat.conversation import Conversation, frame_of
from sparda_compile.chat.settings import ChatSettings
from sparda_compile.chat.streaming import Stop
from sparda_compile.errors import ConfigError, HostPoolFullError
from sparda_compile.evaluation.text.documents import token_ids
from sparda_compile.module.optimized import OptimizedModule

BASE = SpardaConfig(
    mode="query", hint="ema", local_blocks=1, block_size=16, lowering="eager", progress=False
)
NEW = 8
QUESTIONS = ("What does the river do?", "And the stone?", "Who walks under it?")
DOCUMENT = "The old river sees a green stone. Then the light walks under the house. " * 8


@pytest.fixture(scope="module")
def model(shared_llama):
    """A model of this module's own, since its generation config is changed."""
    return optimize(copy.deepcopy(shared_llama), SpardaConfig(mode="dense", lowering="eager"))


@pytest.fixture
def begin(model, byte_tokenizer):
    """Return a function that begins a conversation, with a document unless told otherwise."""

    def make(budget=0.3, *, document=DOCUMENT, is_plain=False, **fields):
        settings = ChatSettings(BASE.replace(**fields), budget, NEW)
        frame = frame_of(byte_tokenizer, is_plain=is_plain)
        conversation = Conversation(model, byte_tokenizer, settings, frame)
        if document:
            conversation.read([torch.tensor(token_ids(byte_tokenizer, document))])
        return conversation

    return make


def ask(conversation, question, stop=None):
    return conversation.ask(question, lambda _: None, stop)


def again(model, conversation, turn):
    """Return what is said when a prompt and its answer are read from scratch, as one text."""
    prompt = torch.tensor([conversation.ids[: -turn.answer_tokens]])
    fresh = optimize(model, conversation.config)
    out = fresh.generate(prompt, max_new_tokens=turn.answer_tokens, do_sample=False)
    return out[0].tolist()


@pytest.mark.parametrize(
    ("budget", "fields"),
    [
        (1.0, {"mode": "query"}),
        (1.0, {"mode": "dense"}),
        # Tokens of a sparse prompt read what a decode step reads, so it does not matter who reads.
        (0.3, {"mode": "query", "prefill": "sparse"}),
        (0.3, {"mode": "exact", "prefill": "sparse", "selector": "quest"}),
    ],
)
def test_turns_on_one_cache_are_one_conversation_read_from_scratch(begin, model, budget, fields):
    conversation = begin(budget, **fields)
    held = len(conversation.ids)
    for question in QUESTIONS:
        turn = ask(conversation, question)
        assert turn.answer_tokens == NEW
        assert turn.ending == "max_new_tokens"
        # The last token that was written is not in the cache yet.
        assert turn.cache_tokens == len(conversation.ids) - 1
        assert turn.read_tokens == len(conversation.ids) - NEW - held
        held = turn.cache_tokens
        assert again(model, conversation, turn) == conversation.ids


def test_text_is_the_templates(begin, byte_tokenizer):
    conversation = begin()
    answers = [ask(conversation, question).answer for question in QUESTIONS[:2]]
    text = byte_tokenizer.decode(conversation.ids)
    first, second = QUESTIONS[:2]
    assert text == (
        f"<user>{DOCUMENT}\n\n{first}</><assistant>{answers[0]}</><user>{second}</><assistant>"
        f"{answers[1]}"
    )
    assert byte_tokenizer.decode(begin(document="").ids) == ""


def test_without_documents_the_first_question_opens(begin, byte_tokenizer):
    conversation = begin(document="")
    turn = ask(conversation, "Hello?")
    text = byte_tokenizer.decode(conversation.ids)
    assert text == f"<user>Hello?</><assistant>{turn.answer}"
    assert turn.read_tokens == len("<user>Hello?</><assistant>")


def test_plain_text_has_no_template(begin, byte_tokenizer):
    conversation = begin(is_plain=True)
    answer = ask(conversation, "It says").answer
    ask(conversation, "More")
    text = byte_tokenizer.decode(conversation.ids)
    assert text.startswith(f"{DOCUMENT}\n\nIt says{answer}\n\nMore")


def test_tokens_that_end_an_answer_are_the_templates_to_write(begin, model, monkeypatch):
    first = begin()
    ask(first, QUESTIONS[0])
    written = first.ids[-NEW:]
    end = next(token for token in written if token != written[0])
    monkeypatch.setattr(model.generation_config, "eos_token_id", [end, 300])
    conversation = begin()
    turn = ask(conversation, QUESTIONS[0])
    assert turn.ending == "end"
    assert turn.answer_tokens == written.index(end) + 1 < NEW
    assert conversation.ids == first.ids[: len(first.ids) - NEW + written.index(end)]
    # All of it is in the cache, so the next turn reads its own words alone.
    assert turn.cache_tokens == len(conversation.ids)
    assert ask(conversation, "So?").read_tokens == len("</><user>So?</><assistant>")


class After(Stop):
    """Ends an answer behind some tokens, or raises as a second Ctrl-C does."""

    def __init__(self, tokens, *, raises=False):
        super().__init__()
        self.tokens, self.raises = tokens, raises

    def __call__(self, *args, **kwargs):
        self.tokens -= 1
        self.is_set = self.tokens <= 0
        if self.is_set and self.raises:
            raise KeyboardInterrupt
        return super().__call__(*args, **kwargs)


def test_interrupted_answer_stays_as_far_as_it_was_written(begin, model):
    conversation, whole = begin(1.0), begin(1.0)
    turn = ask(conversation, QUESTIONS[0], After(3))
    ask(whole, QUESTIONS[0])
    assert (turn.ending, turn.answer_tokens) == ("interrupted", 3)
    assert conversation.ids == whole.ids[: 3 - NEW]
    turn = ask(conversation, QUESTIONS[1])
    assert turn.read_tokens == 1 + len(f"</><user>{QUESTIONS[1]}</><assistant>")
    assert again(model, conversation, turn) == conversation.ids


def test_second_interrupt_takes_the_question_back(begin):
    conversation, other = begin(1.0), begin(1.0)
    for each in (conversation, other):
        ask(each, QUESTIONS[0])
    before = list(conversation.ids)
    with pytest.raises(KeyboardInterrupt):
        ask(conversation, QUESTIONS[1], After(2, raises=True))
    assert conversation.ids == before
    turn = ask(conversation, QUESTIONS[1])
    assert turn.read_tokens == len(conversation.ids) - NEW
    ask(other, QUESTIONS[1])
    assert conversation.ids == other.ids


def test_switching_takes_the_cache_over(begin):
    conversation, other = begin(None, top_k=4), begin(None, top_k=4)
    for each in (conversation, other):
        ask(each, QUESTIONS[0])
    held = len(conversation.ids) - 1
    said = conversation.change(mode="exact", offload="never")
    assert said == f"{held:,} tokens taken over from the cache"
    turn = ask(conversation, QUESTIONS[1])
    assert turn.read_tokens == len(conversation.ids) - NEW - held
    assert (turn.h2d_bytes, turn.d2h_bytes) == (0, 0)
    # Mode exact is equal to query, and where blocks are changes nothing.
    assert ask(other, QUESTIONS[1]).h2d_bytes > 0
    assert conversation.ids == other.ids


def test_switching_without_room_for_two_caches_reads_again(begin, monkeypatch):
    conversation, new_cache = begin(1.0), OptimizedModule.new_cache
    ask(conversation, QUESTIONS[0])

    def full(self, *args, past=None, **kwargs):
        if past is not None:
            raise HostPoolFullError("no room")
        return new_cache(self, *args, **kwargs)

    monkeypatch.setattr(OptimizedModule, "new_cache", full)
    said = conversation.change(mode="dense")
    count = f"{len(conversation.ids):,} tokens"
    assert said.startswith(f"there is no room for two caches: {count}")
    assert said.endswith("read again")


def test_budgets_and_lengths_of_answers_change(begin):
    conversation = begin(0.3)
    num_blocks = -(-len(conversation.ids) // 16)
    assert ask(conversation, QUESTIONS[0]).blocks_read == round(0.3 * num_blocks)
    conversation.change(top_k=1)
    assert ask(conversation, QUESTIONS[1]).blocks_read == 4
    assert conversation.change(max_new_tokens=2) == "nothing has to be built for it"
    assert ask(conversation, QUESTIONS[2]).answer_tokens == 2
    with pytest.raises(ConfigError, match="offload='always' keeps them in CPU memory"):
        conversation.change(mode="speculate")
    assert conversation.settings.base.mode == "query"


def test_share_follows_a_text_that_grows(begin):
    conversation = begin(0.5, document="")
    turn = ask(conversation, "Hello?")
    assert (turn.note, turn.blocks_read) == ("", 3)
    turn = ask(conversation, DOCUMENT)
    assert turn.note.startswith("50% of the blocks are more now: 33 tokens taken over")
    assert turn.blocks_read == round(0.5 * -(-(len(conversation.ids) - NEW) // 16))


def test_reset_keeps_the_documents(begin):
    conversation = begin()
    before = list(conversation.ids)
    first = ask(conversation, QUESTIONS[0])
    assert "tokens in " in conversation.reset()
    assert conversation.ids == before
    turn = ask(conversation, QUESTIONS[0])
    assert (turn.answer, turn.read_tokens) == (first.answer, first.read_tokens)
    empty = begin(document="")
    assert empty.reset() == "nothing is left of the conversation"


def test_stats_are_of_the_last_question(begin):
    conversation = begin(document="")
    assert conversation.stats() == "nothing has been read yet"
    ask(conversation, QUESTIONS[0])
    assert "misses" in conversation.stats()


def test_positions_are_the_most(begin, monkeypatch):
    monkeypatch.setattr(Conversation, "positions", 600)
    with pytest.raises(ConfigError, match=r"the documents .* 596 \+ 8 tokens, .* 600 .*, 4 fewer"):
        begin(document="a" * 590)
    conversation = begin(document="a" * 570)
    turn = ask(conversation, "?")
    assert turn.ending == "positions"
    assert len(conversation.ids) == 600
    before = list(conversation.ids)
    with pytest.raises(ConfigError, match=r"the conversation and the question .* 600 positions"):
        ask(conversation, "?")
    assert conversation.ids == before
    monkeypatch.setattr(Conversation, "positions", None)
    assert ask(conversation, "?").answer_tokens == NEW


def test_tokenizers_without_a_template_need_plain(byte_tokenizer):
    bare = copy.deepcopy(byte_tokenizer)
    bare.chat_template = None
    with pytest.raises(ConfigError, match=r"has no chat template, .* add --plain"):
        frame_of(bare, is_plain=False)
    assert frame_of(bare, is_plain=True).opening == ""

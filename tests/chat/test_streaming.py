from __future__ import annotations

import torch

from sparda_compile.chat.streaming import AnswerStreamer, Stop


def test_streamer_keeps_text_tokens_and_times(byte_tokenizer):
    shown = []
    streamer = AnswerStreamer(byte_tokenizer, shown.append)
    streamer.put(torch.tensor([[1, 2, 3]]))
    assert (streamer.ids, streamer.first_s, streamer.tokens_per_s) == ([], None, None)
    ids = byte_tokenizer("Two words")["input_ids"]
    for place, token in enumerate(ids):
        streamer.put(torch.tensor([token]))
        if place == 0:
            assert streamer.tokens_per_s is None
            assert streamer.first_s > 0
    assert len(shown) > 1  # before the end
    streamer.end()
    assert "".join(shown) == streamer.text == "Two words"
    assert streamer.ids == ids
    assert streamer.tokens_per_s > 0


def test_stop_ends_every_sequence_once_it_is_set():
    stop, ids = Stop(), torch.zeros(3, 5, dtype=torch.long)
    assert stop(ids, None).tolist() == [False] * 3
    stop.is_set = True
    assert stop(ids, None).tolist() == [True] * 3

from __future__ import annotations

import dataclasses
import json

from sparda_compile.chat.turn import Turn

TURN = Turn(
    question="Why?",
    answer="So.",
    ending="end",
    read_tokens=1200,
    answer_tokens=3,
    cache_tokens=6131,
    first_token_s=0.824,
    tokens_per_s=12.34,
    h2d_bytes=3 << 20,
    d2h_bytes=512,
    hit_rate=0.5,
    blocks_read=24,
    blocks=96,
)


def test_facts_are_one_line():
    assert str(TURN) == (
        "12.3 tokens/s, first token after 0.82 s (1,200 tokens read), 3.0 MiB to the device, 512 B "
        "back, 24 of 96 blocks read, cache 6,131 tokens"
    )


def test_what_cut_an_answer_is_said():
    for ending, said in (
        ("interrupted", "interrupted"),
        ("max_new_tokens", "cut at the most tokens of an answer"),
        ("positions", "the model's positions are used up"),
    ):
        assert str(dataclasses.replace(TURN, ending=ending)).endswith(f" tokens, {said}")


def test_times_that_are_not_known_are_dashes():
    short = dataclasses.replace(TURN, first_token_s=None, tokens_per_s=None)
    assert str(short).startswith("- tokens/s, first token after - s")


def test_json_has_every_field():
    assert json.loads(json.dumps(TURN.to_dict())) == dataclasses.asdict(TURN)

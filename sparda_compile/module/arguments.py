"""Every argument of `forward` and of `generate`, and what an optimized module does with it.

The tables hold what transformers' signatures name: the arguments of every causal LM's forward,
those of `generate`, and the attributes of a `GenerationConfig`, which may come with a call, in a
config that is given, or in the one that was saved with the model.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Final, Literal

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["CONFIG", "FORWARD", "GENERATE", "Argument"]


@dataclasses.dataclass(frozen=True)
class Argument:
    """One row of a table.

    Attributes:
        kind: `used`: it does what it does in transformers. `no effect`: results are the same with
            and without it. `refused`: an error names it.
        what: What happens, or why it is refused and what to do instead.
        allows: Which values are not refused.
        only: The version of transformers that alone has it, of 5.17 and 5.24.
    """

    kind: Literal["used", "no effect", "refused"]
    what: str
    allows: Callable[[Any], bool]
    only: Literal["", "5.17", "5.24"] = ""


def _any(value: Any) -> bool:
    del value
    return True


def _unset(value: Any) -> bool:
    return value is None or value is False


def _absent(value: Any) -> bool:
    return value is None


def _nothing(value: Any) -> bool:
    del value
    return False


def _used(*names: str, what: str, allows: Callable[[Any], bool] = _any) -> dict[str, Argument]:
    return dict.fromkeys(names, Argument("used", what, allows))


def _idle(*names: str, what: str) -> dict[str, Argument]:
    return dict.fromkeys(names, Argument("no effect", what, _any))


def _refused(*names: str, what: str, allows: Callable[[Any], bool] = _unset) -> dict[str, Argument]:
    return dict.fromkeys(names, Argument("refused", what, allows))


def _marked(only: Literal["5.17", "5.24"], rows: dict[str, Argument]) -> dict[str, Argument]:
    return {name: dataclasses.replace(row, only=only) for name, row in rows.items()}


_NO_LOSS: Final = "no loss is computed; take the logits and compute it from them"
_LOGITS_ALONE: Final = "a program returns logits and the cache alone; ask the model itself for it"
_OTHER_IDS: Final = (
    "the programs were traced without it; leave it out, also of what a tokenizer returns"
)
_PACKED: Final = (
    "several texts in one row are not told apart; pass one text a row, with padding on the left"
)
_NO_ENCODER: Final = (
    "there is no attention to what an encoder or another model returned; use the model itself"
)
_NO_MEDIA: Final = "text alone is taken; use the model itself for images and sound"
_NO_CROP: Final = (
    "assisted and prompt-lookup generation take tokens back from the KV cache, which keeps them; "
    "leave it unset"
)
_FROM_HUB: Final = (
    "transformers loads this way to generate from the Hub, and nothing proves such code; leave it "
    "unset"
)

FORWARD: Final[dict[str, Argument]] = {
    **_used("input_ids", what="the new tokens, [batch, tokens] of whole numbers in the vocabulary"),
    **_used(
        "attention_mask",
        what="0 hides a token, whose own logits then mean nothing; one entry for each token of the "
        "cache, as it was, and for each new one",
    ),
    **_used("position_ids", what="positions of the new tokens; None counts columns"),
    **_marked(
        "5.24",
        _used(
            "cache", what="a cache of this module, which goes on from its tokens; None starts one"
        ),
    ),
    **_marked("5.17", _used("past_key_values", what="the older name of `cache`; both work")),
    **_used(
        "use_cache",
        what="False returns no cache where none is given, None does what the model's config says",
    ),
    **_used(
        "return_dict",
        what="False returns a tuple",
    ),
    **_used(
        "logits_to_keep",
        what="0 keeps all logits, n those of the last n tokens, a tensor those at its indices",
    ),
    **_refused(
        "inputs_embeds",
        what="the programs begin at token ids; pass input_ids",
        allows=_absent,
    ),
    **_refused("labels", "num_items_in_batch", what=_NO_LOSS, allows=_absent),
    **_refused(
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        what=_LOGITS_ALONE,
    ),
    **_refused(
        "is_causal",
        what="attention was proved to be causal and stays so; leave it unset",
        allows=lambda value: value is None or value is True,
    ),
    **_refused(
        "cu_seq_lens_q",
        "cu_seq_lens_k",
        "max_length_q",
        "max_length_k",
        "seq_idx",
        what=_PACKED,
        allows=_absent,
    ),
    **_refused(
        "token_type_ids",
        "task_type_ids",
        "lang_ids",
        "input_shape_ids",
        "input_pronunciation_ids",
        "per_layer_inputs",
        "langs",
        "lengths",
        "perm_mask",
        "target_mapping",
        "input_mask",
        "num_hashes",
        what=_OTHER_IDS,
        allows=_absent,
    ),
    **_refused(
        "encoder_hidden_states",
        "encoder_attention_mask",
        "encoder_outputs",
        "backbone_last_hidden_state",
        "shared_kv_states",
        "cross_attention_states",
        "cross_attention_mask",
        "full_text_row_masked_out_mask",
        what=_NO_ENCODER,
        allows=_absent,
    ),
    **_refused(
        "state",
        "mems",
        "use_mems",
        "past_buckets_states",
        what="the KV cache is the one state there is; pass it as `cache`",
    ),
    **_marked(
        "5.17",
        _refused("cache_params", what="there is no recurrent state; pass `cache`", allows=_absent),
    ),
    **_refused(
        "pixel_values",
        "image_embeds",
        "image_embeds_position_mask",
        "image_patches",
        "image_pixel_values",
        "image_sizes",
        "image_attention_mask",
        "interpolate_pos_encoding",
        "audio_input_features",
        "audio_embed_sizes",
        "audio_attention_mask",
        what=_NO_MEDIA,
    ),
    **_marked("5.24", _refused("mm_encoder_outputs", what=_NO_MEDIA, allows=_absent)),
}
"""Arguments of a causal LM's forward."""

GENERATE: Final[dict[str, Argument]] = {
    **_used(
        "inputs",
        what="the prompt, by another name than `input_ids`; without one it is `bos_token_id`",
    ),
    **_used(
        "generation_config",
        what="its attributes hold where the call names none; those that it leaves at None are "
        "taken from the model's own",
    ),
    **_used(
        "logits_processor",
        "prefix_allowed_tokens_fn",
        what="transformers calls it with the logits of each step",
    ),
    **_used("stopping_criteria", what="transformers asks it after each step"),
    **_used("streamer", what="gets each token as it is chosen"),
    **_used("tokenizer", what="reads `stop_strings`"),
    **_used(
        "negative_prompt_ids",
        "negative_prompt_attention_mask",
        what="a second text, read with a cache of its own where `guidance_scale` is set; it may "
        "not end in padding",
    ),
    **_used(
        "custom_generate",
        what="a function runs the loop in the place of transformers' own; the name of a "
        "repository is refused, as what it would load is not known: pass a function",
        allows=lambda value: not isinstance(value, str),
    ),
    **_refused(
        "synced_gpus",
        what="a module runs on one device and waits for no other; leave it unset",
    ),
    **_refused("assistant_model", what=_NO_CROP),
    **_refused(
        "return_dict",
        what="generate asks forward for an object itself; use return_dict_in_generate",
        allows=_nothing,
    ),
    **_idle("assistant_tokenizer", what="is for an `assistant_model`, which is refused"),
    **_idle("trust_remote_code", what="is for a repository of `custom_generate`, which is refused"),
}
"""Arguments of `generate` itself; it takes those of `FORWARD` and `CONFIG` too."""

_SAMPLER: Final = "transformers applies it to the logits that the module returns"
_STOPS: Final = "transformers stops by it"
_RETURNS: Final = "is returned as transformers does"
_ONLY_ASSISTED: Final = "is for assisted generation, which is refused"
_ONLY_GROUPS: Final = "is for a way to generate that is refused"

CONFIG: Final[dict[str, Argument]] = {
    **_used(
        "max_length",
        "max_new_tokens",
        what="transformers stops by it, and the cache reserves as much",
    ),
    **_used("max_time", "stop_strings", "eos_token_id", what=_STOPS),
    **_used(
        "pad_token_id",
        what="fills sequences that have ended; without an attention mask it says what padding is",
    ),
    **_used("bos_token_id", what="the prompt where none is given"),
    **_used(
        "do_sample",
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "top_h",
        "typical_p",
        "epsilon_cutoff",
        "eta_cutoff",
        "repetition_penalty",
        "encoder_repetition_penalty",
        "no_repeat_ngram_size",
        "encoder_no_repeat_ngram_size",
        "bad_words_ids",
        "renormalize_logits",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "remove_invalid_values",
        "exponential_decay_length_penalty",
        "suppress_tokens",
        "begin_suppress_tokens",
        "sequence_bias",
        "watermarking_config",
        "min_length",
        "min_new_tokens",
        what=_SAMPLER,
    ),
    **_used(
        "guidance_scale",
        what="transformers reads a second text, with a cache of its own, and mixes the logits",
    ),
    **_used(
        "num_return_sequences",
        what="the prompt is read once for each; a cache that is given holds as many sequences",
    ),
    **_used(
        "num_beams",
        what="beams copy the keys of a sequence whenever they go on from another, so they are slow "
        "at great lengths",
    ),
    **_used("early_stopping", "length_penalty", what="ends and ranks beams"),
    **_used("output_scores", "output_logits", "return_dict_in_generate", what=_RETURNS),
    **_used(
        "use_cache",
        what="False returns no cache where none is given; tokens are read once all the same",
    ),
    **_used(
        "prefill_chunk_size",
        what="the prompt is read in such pieces; pieces of one token are refused, as they would "
        "be decoded: pass 2 or more",
        allows=lambda value: value is None or (isinstance(value, int) and value > 1),
    ),
    **_refused(
        "output_attentions",
        "output_hidden_states",
        what=_LOGITS_ALONE,
    ),
    **_refused(
        "cache_implementation",
        what="an optimized module brings its own cache; leave it unset",
        allows=lambda value: value is None or value == "hybrid",  # transformers unsets this one
    ),
    **_refused("prompt_lookup_num_tokens", "assistant_early_exit", what=_NO_CROP, allows=_absent),
    **_refused("use_mtp", "is_assistant", what=_NO_CROP),
    **_refused(
        "token_healing",
        what="it generates within generate, with a cache that is not a SpardaCache; heal the "
        "prompt with the model itself before",
    ),
    **_refused("penalty_alpha", what=_FROM_HUB, allows=lambda value: not value),
    **_refused("dola_layers", "constraints", "force_words_ids", what=_FROM_HUB, allows=_absent),
    **_refused("num_beam_groups", what=_FROM_HUB, allows=lambda value: value is None or value == 1),
    **_idle("diversity_penalty", "low_memory", what=_ONLY_GROUPS),
    **_idle(
        "num_assistant_tokens",
        "num_assistant_tokens_schedule",
        "assistant_confidence_threshold",
        "max_matching_ngram_size",
        "assistant_lookbehind",
        "target_lookbehind",
        "assistant_ensemble_weight",
        "speculation_type",
        what=_ONLY_ASSISTED,
    ),
    **_idle(
        "cache_config",
        "max_cache_len",
        what="is for a cache of transformers; an optimized module brings its own",
    ),
    **_idle(
        "compile_config",
        "disable_compile",
        what="what is compiled is said by `SpardaConfig.lowering`",
    ),
    **_idle(
        "continuous_batching_config",
        what="is for `generate_batch`, which an optimized module lacks",
    ),
    **_idle("decoder_start_token_id", what="is for models with an encoder"),
    **_idle(
        "transformers_version",
        "_from_model_config",
        what="says where a config is from",
    ),
    **_marked("5.17", _idle("_commit_hash", what="says where a config is from")),
}
"""Attributes of a `GenerationConfig`, each also an argument of `generate`."""

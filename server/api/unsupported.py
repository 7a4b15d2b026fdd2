"""Fields of other servers and of OpenAI that this one refuses rather than ignores."""

from __future__ import annotations

import logging

from pydantic import BaseModel

from server.api.chat_protocol import Conversation
from server.errors import UnsupportedParameter

logger = logging.getLogger(__name__)

# Field to the values that ask for nothing; null always does.
REFUSED: dict[str, tuple[object, ...]] = {
    "suffix": ("",),
    "prompt_embeds": (),
    "truncation_side": ("left",),
    "logprob_token_ids": ([],),
    "spaces_between_special_tokens": (True,),
    "use_beam_search": (False,),
    "length_penalty": (1, 1.0),
    "early_stopping": (False,),
    "json_schema": (),
    "regex": (),
    "ebnf": (),
    "grammar": (),
    "stop_regex": (),
    "functions": ([],),
    "function_call": ("none",),
    "stream_interval": (1,),
    "repetition_detection": (),
    "thinking_token_budget": (),
    "kv_transfer_params": (),
    "vllm_xargs": (),
    "lora_path": (),
    "custom_logit_processor": (),
    "logits_processors": ([],),
    "typical_p": (1, 1.0),
    "mirostat": (0,),
    "repeat_penalty": (1, 1.0),
    "guided_whitespace_pattern": (),
    "structural_tag": (),
    "no_stop_trim": (False,),
    "session_params": (),
    "n_predict": (),
    "max_new_tokens": (),
    "stop_sequences": ([],),
    "truncate": (),
    "random_seed": (),
    "do_sample": (True,),
    "num_beams": (1,),
    "no_repeat_ngram_size": (0,),
    "samplers": (),
    "typ_p": (1, 1.0),
    "repeat_last_n": (-1,),  # all of prompt and text, as here
    "lora_request": (),
    "adapter_id": (),
    "xtc_probability": (0, 0.0),
    "dry_multiplier": (0, 0.0),
    "mirostat_mode": (0,),
    # Alone they do nothing: by their usual values they ask for nothing.
    "xtc_threshold": (0.1, 1, 1.0),
    "dry_base": (1.75,),
    "dry_allowed_length": (2,),
    "dry_penalty_last_n": (-1, 0),
    "dry_sequence_breakers": ([], ["\n", ":", '"', "*"]),
    "mirostat_tau": (5, 5.0),
    "mirostat_eta": (0.1,),
}


# Without messages only.
REFUSED_IN_COMPLETIONS: dict[str, tuple[object, ...]] = {
    **REFUSED,
    "max_completion_tokens": (),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True,),
}


# With messages only.
REFUSED_IN_CHAT: dict[str, tuple[object, ...]] = {
    **REFUSED,
    "echo": (False,),
    "chat_template": (),
    "documents": ([],),
    "best_of": (1,),
    "modalities": (["text"],),
    "audio": (),
    "web_search_options": (),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "mm_processor_kwargs": (),
    "system": (),
    "thinking": (),
    "enable_thinking": (),  # of chat_template_kwargs it is served
}


def check_supported(request: BaseModel) -> None:
    """Raises UnsupportedParameter naming the first field that would go unheeded."""
    is_chat = isinstance(request, Conversation)
    refused = REFUSED_IN_CHAT if is_chat else REFUSED_IN_COMPLETIONS
    extra = request.model_extra or {}
    for name in sorted(extra.keys() & refused.keys()):
        value = extra[name]
        harmless = any(value == each and type(value) is type(each) for each in refused[name])
        if value is not None and not harmless:
            raise UnsupportedParameter(name)
    if logger.isEnabledFor(logging.DEBUG) and (ignored := extra.keys() - refused.keys()):
        # Quoted, for a name may hold a line of its own.
        shown = sorted(repr(name[:64]) for name in ignored)[:10]
        logger.debug("ignored unknown fields: %s", ", ".join(shown))

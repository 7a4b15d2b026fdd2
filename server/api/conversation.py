"""A request's conversation to a prompt: checked, rendered by the chat template, tokenised."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from functools import lru_cache, partial

from anyio import to_thread
from jinja2 import TemplateError

from server.api.chat_protocol import Conversation, Scalar
from server.api.chat_template import ChatTemplate, Turns
from server.api.in_time import in_time
from server.api.interruptible import Interruptible
from server.api.limits import check_chars
from server.api.service import Service
from server.api.tools import check_tools, offered_tools, template_message
from server.errors import RequestError, UnsupportedParameter

logger = logging.getLogger(__name__)

MAX_VARIABLES = 16
_MAX_REASON_CHARS = 200
_IDENTIFIER = re.compile(r"[A-Za-z_]\w*")
# Arguments of the renderer and names it defines itself; special tokens are told by their ending.
_RESERVED = frozenset(
    {
        "add_generation_prompt",
        "chat_template",
        "continue_final_message",
        "conversation",
        "conversations",
        "cycler",
        "dict",
        "documents",
        "joiner",
        "lipsum",
        "loop",
        "max_length",
        "messages",
        "namespace",
        "padding",
        "raise_exception",
        "range",
        "return_assistant_tokens_mask",
        "return_dict",
        "return_tensors",
        "sanitize_control_tokens",
        "self",
        "strftime_now",
        "tokenize",
        "tokenizer_kwargs",
        "tools",
        "truncation",
    }
)
# Field of a message to the values that say nothing; null always does.
REFUSED_IN_MESSAGES: dict[str, tuple[object, ...]] = {
    "function_call": (),
    "audio": (),
    "images": ([],),
    "prefix": (False,),
    "reasoning": ("",),
    "reasoning_content": ("",),
    "thinking": ("",),
    "videos": ([],),
}


async def conversation_ids(conversation: Conversation, service: Service) -> list[int]:
    """Token ids of a rendered conversation; rendered and tokenised off the event loop.

    Raises:
        RequestError: the template does not take this conversation, or takes too long over it.
        ThreadsBusy: others were being rendered all the time.
    """
    codec, http = service.codec, service.config.http
    template = _check(conversation, codec.chat_template)
    check_chars(sum(len(message.text) for message in conversation.messages), http, "messages")
    text = await _render_in_time(conversation, template, service)
    check_chars(len(text), http, "messages")
    adds_special = conversation.add_special_tokens is True  # templates write them themselves
    return await service.convert(partial(codec.encode, text, adds_special, "messages"), len(text))


async def _render_in_time(
    conversation: Conversation, template: ChatTemplate, service: Service
) -> str:
    """Rendered in a thread, of which there are a few; the limit of time ends it."""
    seconds = service.config.http.template_seconds
    work = Interruptible()
    try:
        return await in_time(
            partial(to_thread.run_sync, abandon_on_cancel=True, limiter=service.render_threads),
            partial(work.run, partial(_render, conversation, template)),
            seconds,
            "chat templates",
        )
    except TimeoutError as error:
        raise RequestError(
            f"messages: the chat template took longer than {seconds:g} s", param="messages"
        ) from error
    finally:
        # Also where the client has gone; nothing to do where it has come to its end.
        work.interrupt()


def _check(conversation: Conversation, template: ChatTemplate | None) -> ChatTemplate:
    """The template, once all that can be told without rendering is in order.

    Raises:
        RequestError: this server has no template, or the conversation asks for what it cannot do.
    """
    if template is None:
        raise RequestError(
            "the served model has no chat template; send text to /v1/completions",
            param="messages",
            code="no_chat_template",
        )
    for index, message in enumerate(conversation.messages):
        _check_message(message.model_extra or {}, f"messages.{index}")
    if conversation.continue_final_message and conversation.add_generation_prompt:
        raise RequestError(
            "continue_final_message and add_generation_prompt exclude one another",
            param="continue_final_message",
        )
    check_tools(conversation, _mentioned(template.source))
    _check_variables(conversation.chat_template_kwargs or {}, template.source)
    return template


def _render(conversation: Conversation, template: ChatTemplate) -> str:
    """Slow for long conversations: not for the event loop.

    Raises:
        RequestError: the template does not take this conversation.
    """
    turns = _turns(conversation, template)
    try:
        return template.render(turns)
    except TemplateError as error:
        # Written for users: templates raise it over roles they do not know, and the like.
        reason = str(error)[:_MAX_REASON_CHARS]
        raise RequestError(
            f"messages: the chat template says: {reason}", param="messages"
        ) from error
    except Exception as error:
        # Whatever else a template stumbles over came with the request.
        logger.debug("the chat template failed", exc_info=True)
        raise RequestError(
            f"messages: the chat template cannot render them ({type(error).__name__})",
            param="messages",
        ) from error


def _turns(conversation: Conversation, template: ChatTemplate) -> Turns:
    messages = [
        template_message(message, _role(message.role, template.source))
        for message in conversation.messages
    ]
    continues = bool(conversation.continue_final_message)
    opens = not continues and conversation.add_generation_prompt is not False
    variables = conversation.chat_template_kwargs or {}
    return Turns(messages, opens, continues, offered_tools(conversation), variables)


def _role(role: str, source: str) -> str:
    """OpenAI's newer name of the system role, for templates that do not know it."""
    is_unknown = role == "developer" and role not in _mentioned(source)
    return "system" if is_unknown else role


def _check_message(extra: Mapping[str, object], where: str) -> None:
    for name in sorted(extra.keys() & REFUSED_IN_MESSAGES.keys()):
        if extra[name] is not None and extra[name] not in REFUSED_IN_MESSAGES[name]:
            raise UnsupportedParameter(f"{where}.{name}")


def _check_variables(variables: Mapping[str, Scalar], source: str) -> None:
    if len(variables) > MAX_VARIABLES:
        raise RequestError(
            f"chat_template_kwargs: {len(variables)} entries, the limit is {MAX_VARIABLES}",
            param="chat_template_kwargs",
        )
    for name in variables:
        if not _may_set(name, source):
            shown = name[:64]
            raise RequestError(
                f"chat_template_kwargs.{shown}: the served model's chat template has no such "
                "variable for requests to set",
                param=f"chat_template_kwargs.{shown}",
            )


def _may_set(name: str, source: str) -> bool:
    is_reserved = name in _RESERVED or name.startswith("_") or name.endswith(("_token", "_tokens"))
    return not is_reserved and name in _mentioned(source)


@lru_cache(maxsize=4)
def _mentioned(source: str) -> frozenset[str]:
    """Every identifier of a template; more than its free variables, which does no harm."""
    return frozenset(_IDENTIFIER.findall(source))

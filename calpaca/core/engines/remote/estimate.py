"""Token counts where no tokenizer is at hand."""

from __future__ import annotations

from math import ceil

from calpaca.core.engine import Conversation
from calpaca.core.template import describe_tools, normalise

_BYTES_PER_TOKEN = 3  # English has 4 to 5, Chinese one character
_PER_MESSAGE = 8  # what a template puts around it
_TEMPLATE = 64  # a system text that a template brings


def estimated_tokens(text: str) -> int:
    """About how many tokens a text has, rather too many than too few."""
    return ceil(len(text.encode(errors="replace")) / _BYTES_PER_TOKEN)


def plain_messages(conversation: Conversation) -> list[dict[str, str]]:
    """A conversation in roles that every server knows: tools and their results as text, system first."""
    described = describe_tools(conversation.messages, conversation.tools)
    return [
        {"role": turn["role"], "content": turn["content"]} for turn in normalise(described, keep_tool_messages=False)
    ]


def estimated_prompt(conversation: Conversation) -> int:
    """About how many tokens a conversation's prompt has, rather too many than too few."""
    messages = plain_messages(conversation)
    return _TEMPLATE + sum(_PER_MESSAGE + estimated_tokens(message["content"]) for message in messages)


def most_tokens(conversation: Conversation | None, text: str) -> int:
    """More tokens than a prompt can have: none is less than a byte."""
    if conversation is None:
        return len(text.encode(errors="replace")) + 1
    messages = plain_messages(conversation)
    return 4 * _TEMPLATE + sum(
        2 * _PER_MESSAGE + len(message["content"].encode(errors="replace")) for message in messages
    )

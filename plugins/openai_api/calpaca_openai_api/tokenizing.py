"""/tokenize and /detokenize, as vLLM has them: what lets a client count and score with the model's own tokenizer."""

from __future__ import annotations

from typing import Any

from calpaca.core.model import Model
from calpaca_openai_api.bodies import DetokenizeBody, TokenizeBody
from calpaca_openai_api.faults import ApiError
from calpaca_openai_api.messages import plain_messages


def tokenize(body: TokenizeBody, model: Model) -> dict[str, Any]:
    """Raises ApiError unless there is either a text or a conversation, UnsupportedError where no ids are known."""
    if (body.prompt is None) == (body.messages is None):
        raise ApiError(400, "Give either 'prompt' or 'messages'.", param="prompt")
    if body.prompt is not None:
        tokens = model.engine.encode(body.prompt, special_tokens=body.add_special_tokens)
    else:
        tools = [tool.model_dump(exclude_none=True) for tool in body.tools or ()]
        tokens = model.message_ids(plain_messages(body.messages or ()), tools)
    return {"count": len(tokens), "max_model_len": model.context_length, "tokens": tokens}


def detokenize(body: DetokenizeBody, model: Model) -> dict[str, Any]:
    """Raises ApiError for an id that the tokenizer does not have."""
    try:
        return {"prompt": model.engine.decode(body.tokens)}
    except (OverflowError, IndexError, TypeError) as error:
        raise ApiError(400, "A token id is outside the vocabulary.", param="tokens") from error

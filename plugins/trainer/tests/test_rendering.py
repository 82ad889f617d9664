"""What is learnt: the assistant's tokens and no others, after exactly the prompt that chat and server send."""

from __future__ import annotations

import pytest

from calpaca.core.errors import ModelError
from calpaca.core.golden import CONTROL_TOKENS, CONVERSATIONS
from calpaca.core.template import NAMED_TEMPLATES, ChatTemplate, choose_template, normalise
from calpaca.core.tokenizer import load_tokenizer
from calpaca_trainer.conversation import Conversation
from calpaca_trainer.rendering import ConversationRenderer, Example, TextRenderer, TooLong

ANSWER = {"role": "assistant", "content": "A llama, “一种骆驼科动物”,\n  of course. 🦙"}
GOLDEN = {
    name: Conversation((*messages, ANSWER))
    for name, messages in {**CONVERSATIONS, "control tokens": CONTROL_TOKENS}.items()
}
CASES = [("smollm2", "own"), *((folder, name) for folder in ("smollm2", "pieces") for name in NAMED_TEMPLATES)]


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def case(request) -> tuple[str, str]:
    """A folder with a tokenizer (byte-level BPE, and SentencePiece), and a template."""
    return request.param


@pytest.fixture(scope="module")
def tokenizer(case, request):
    return load_tokenizer(request.getfixturevalue(case[0]))


@pytest.fixture(scope="module")
def template(case, tokenizer) -> ChatTemplate:
    return choose_template(tokenizer, NAMED_TEMPLATES.get(case[1]))


def eos_id(tokenizer) -> int:
    return tokenizer.token_id(tokenizer.special_tokens["eos_token"])


def examples_of(conversation, template, tokenizer, **options) -> list[Example]:
    chosen = {"loss_on": "all", "max_length": 4096, **options}
    (examples,) = ConversationRenderer(template, tokenizer, [eos_id(tokenizer)], **chosen).render([conversation])
    return examples


@pytest.mark.parametrize("name", GOLDEN)
def test_every_answer_is_learnt_after_the_prompt_that_chat_sends(name, template, tokenizer) -> None:
    turns = normalise(GOLDEN[name].messages, keep_tool_messages=template.takes_tools)
    answers = [at for at, message in enumerate(turns) if message["role"] == "assistant"]
    examples = examples_of(GOLDEN[name], template, tokenizer)
    learnt = [(example.ids, span) for example in examples for span in example.spans]
    assert len(learnt) == len(answers)
    for (ids, (start, end)), at in zip(learnt, answers, strict=True):
        assert ids[:start] == tokenizer.encode(template.parts(turns[:at]))
        assert ids[end - 1] == eos_id(tokenizer) or ids[end - 1] == tokenizer.token_id("<|im_end|>")
        assert tokenizer.decode(ids[start : end - 1]).strip() == turns[at]["content"].strip()


@pytest.mark.parametrize("name", GOLDEN)
def test_the_last_answer_alone_is_learnt_when_it_is_asked_for(name, template, tokenizer) -> None:
    (example,) = examples_of(GOLDEN[name], template, tokenizer, loss_on="last")
    ((start, end),) = example.spans
    assert end == len(example.ids)
    assert tokenizer.decode(example.ids[start : end - 1]).strip() == ANSWER["content"]


def test_turns_that_share_their_tokens_are_one_example(smollm2) -> None:
    tokenizer = load_tokenizer(smollm2)
    (example,) = examples_of(GOLDEN["several turns"], choose_template(tokenizer), tokenizer)
    assert len(example.spans) == 3


def test_what_is_too_long_is_left_out_whole(smollm2) -> None:
    tokenizer = load_tokenizer(smollm2)
    template = choose_template(tokenizer)
    whole = examples_of(GOLDEN["several turns"], template, tokenizer)[0]
    cut = examples_of(GOLDEN["several turns"], template, tokenizer, max_length=len(whole.ids) - 1)
    assert cut == [Example(whole.ids[: whole.spans[1][1]], whole.spans[:2]), TooLong(len(whole.ids))]


def test_an_example_that_just_fits_keeps_its_end(template, tokenizer) -> None:
    (example,) = examples_of(GOLDEN["single turn"], template, tokenizer)
    assert examples_of(GOLDEN["single turn"], template, tokenizer, max_length=len(example.ids)) == [example]


def test_a_template_that_writes_something_else_before_an_answer_is_refused(smollm2) -> None:
    tokenizer = load_tokenizer(smollm2)
    thinking = ChatTemplate(
        "{% for m in messages %}{{ m.role + ':' + m.content }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:<think>' }}{% endif %}",
        tokenizer.special_tokens,
    )
    with pytest.raises(ModelError, match="cannot be trained on"):
        examples_of(GOLDEN["single turn"], thinking, tokenizer)


def test_many_are_encoded_as_one_by_one(template, tokenizer) -> None:
    renderer = ConversationRenderer(template, tokenizer, [eos_id(tokenizer)], loss_on="all", max_length=4096)
    assert list(renderer.render(GOLDEN.values())) == [
        examples_of(each, template, tokenizer) for each in GOLDEN.values()
    ]


def test_a_text_ends_with_its_token_and_is_cut_into_pieces(tokenizer) -> None:
    text = "Llamas live in the Andes. </s> <|im_end|> " * 3
    (whole,) = TextRenderer(tokenizer, eos_id(tokenizer), max_length=4096).render([text])
    (pieces,) = TextRenderer(tokenizer, eos_id(tokenizer), max_length=16).render([text])
    assert [index for piece in pieces for index in piece.ids] == whole[0].ids
    assert whole[0].ids.count(eos_id(tokenizer)) == 1
    assert whole[0].ids[-1] == eos_id(tokenizer)
    assert tokenizer.decode(whole[0].ids[:-1]).strip() == text.strip()
    assert all(piece.spans == ((0, len(piece.ids)),) for piece in pieces)

"""Golden conversations: every face turns them into the same token ids.

A face is a way from messages to token ids. A new one is added to `FACES` and is tested with the rest.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM  # noqa: E402

from calpaca.core.conversation import Conversation  # noqa: E402
from calpaca.core.engine import Sampling  # noqa: E402
from calpaca.core.files import find_files  # noqa: E402
from calpaca.core.golden import CONTROL_TOKENS, CONVERSATIONS, GoldenRendering, render_golden  # noqa: E402
from calpaca.core.langchain import ChatCalpaca  # noqa: E402
from calpaca.core.model import Model  # noqa: E402
from calpaca.core.runtime import Runtime  # noqa: E402
from calpaca.core.settings import Settings  # noqa: E402
from calpaca.core.spec import ModelSpec  # noqa: E402
from calpaca.core.template import (  # noqa: E402
    NAMED_TEMPLATES,
    Message,
    choose_template,
    named_template,
    normalise,
    template_digest,
    template_name,
)
from calpaca.core.tokenizer import load_tokenizer  # noqa: E402
from calpaca.plugins.wiring import build_runtime  # noqa: E402

Messages = Sequence[Message]
Face = Callable[[Path, Messages], list[int]]


# ---- faces -------------------------------------------------------------------------------------------------------


@cache
def runtime() -> Runtime:
    return build_runtime(Settings())


@cache
def model_and_prompts(folder: Path) -> tuple[Model, list[Any]]:
    """A loaded model, and the prompts that reach its engine."""
    model = runtime().model(str(folder))
    prompts: list[Any] = []
    submit = model.engine.submit

    def recording(request):
        prompts.append(request.prompt)
        return submit(request)

    model.engine.submit = recording
    return model, prompts


def chat(folder: Path, messages: Messages) -> list[int]:
    model, prompts = model_and_prompts(folder)
    model.chat(messages, Sampling(max_new_tokens=1)).result()
    return list(prompts.pop())


def session(folder: Path, messages: Messages) -> list[int]:
    """As `calpaca chat` does it: the messages are those of a kept session."""
    model, prompts = model_and_prompts(folder)
    kept = runtime().sessions.new({})
    for message in messages:
        kept.add(message["role"], message["content"])
    list(Conversation(kept, model, Sampling(max_new_tokens=1)).answer())
    return list(prompts.pop())


def server(folder: Path, messages: Messages) -> list[int]:
    """As a client of the OpenAI-compatible server gets it."""
    _, prompts = model_and_prompts(folder)
    body = {"model": folder.name, "messages": [dict(each) for each in messages], "max_tokens": 1}
    response = asyncio.run(asked(folder, body))
    assert response.status_code == 200, response.text
    return list(prompts.pop())


async def asked(folder: Path, body: dict[str, Any]) -> Any:
    httpx, served, api = (
        pytest.importorskip(name) for name in ("httpx2", "calpaca_openai_api.served", "calpaca_openai_api.server")
    )
    settings = pytest.importorskip("calpaca_openai_api.settings")
    models = served.ServedModels(runtime(), ModelSpec(model=str(folder)))
    app, _ = api.build_app(models, settings.ServeOptions(), {})
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000") as client:
        return await client.post("/v1/chat/completions", json=body | {"model": models.main.id}, timeout=60)


def training(folder: Path, messages: Messages) -> list[int]:
    """The context in which `calpaca train sft` learns an answer."""
    prompting = pytest.importorskip("calpaca_trainer.prompting")
    rendering = pytest.importorskip("calpaca_trainer.rendering")
    conversation = pytest.importorskip("calpaca_trainer.conversation")
    known = prompting.load_prompting(find_files(ModelSpec(model=str(folder)), runtime()))
    renderer = rendering.ConversationRenderer(
        known.template, known.tokenizer, known.eos_ids, loss_on="last", max_length=1024
    )
    answered = conversation.Conversation((*messages, {"role": "assistant", "content": "An answer."}))
    ((example,),) = renderer.render([answered])
    ((start, _),) = example.spans
    return list(example.ids[:start])


def langchain(folder: Path, messages: Messages) -> list[int]:
    _, prompts = model_and_prompts(folder)
    ChatCalpaca(model=str(folder), runtime=runtime(), max_new_tokens=1).invoke([dict(each) for each in messages])
    return list(prompts.pop())


def hugging_face(folder: Path, messages: Messages) -> list[int]:
    """As any program that uses transformers alone; runs of a role are merged before, since templates demand it."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    turns = normalise(messages, keep_tool_messages=True)
    return list(tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False))


@cache
def rewritten(folder: Path) -> Path:
    from calpaca.core.checkpoint.write import write_model
    from calpaca.core.export.hugging_face import plan_hugging_face

    output = folder.with_name(f"{folder.name}-hf")
    write_model(plan_hugging_face(folder), output, runtime().jobs)
    return output


def hugging_face_export(folder: Path, messages: Messages) -> list[int]:
    """As transformers alone uses the folder that `calpaca models export --format hf` writes."""
    return hugging_face(rewritten(folder), messages)


@cache
def exported(folder: Path) -> Path:
    from calpaca.core.export.gguf_export import GgufOptions, export_gguf

    output = folder.with_name(f"{folder.name}-gguf")
    files = find_files(ModelSpec(model=str(folder)), runtime())
    export_gguf(files, output, runtime().jobs, GgufOptions(type="f16", logits=False))
    return next(output.glob("*.gguf"))


def gguf_export(folder: Path, messages: Messages) -> list[int]:
    """A chat with the exported file: vocabulary and template are read back from it."""
    return chat(exported(folder), messages)


FACES: dict[str, Face] = {
    "chat": chat, "session": session, "server": server, "training": training, "langchain": langchain,
    "hugging face": hugging_face, "hugging face export": hugging_face_export, "GGUF": gguf_export,
}  # fmt: skip
OBEDIENT = {"hugging face", "hugging face export"}
"""Faces of other programs, which obey control tokens that a message spells."""
TAKES_NO_NORMALISING = {"GGUF"}
"""The SentencePiece vocabulary of these tests normalises white space; a GGUF file cannot say so and is refused. Those of
LLaMA and Chinese-LLaMA are tested with the export."""


@pytest.fixture(scope="module", autouse=True)
def closed() -> Iterator[None]:
    yield
    runtime().close()


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory, smollm2: Path) -> Path:
    """A tiny model with SmolLM2's tokenizer and template."""
    folder = tmp_path_factory.mktemp("byte-level")
    save_tiny_model(folder, 49152)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).write_bytes((smollm2 / name).read_bytes())
    return folder


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory: pytest.TempPathFactory, small_pieces: Path) -> Path:
    """A tiny model with a SentencePiece vocabulary and the template of Chinese-LLaMA-Alpaca-2."""
    folder = tmp_path_factory.mktemp("sentencepiece")
    save_tiny_model(folder, 2048)
    (folder / "tokenizer.model").write_bytes((small_pieces / "tokenizer.model").read_bytes())
    (folder / "chat_template.jinja").write_text(NAMED_TEMPLATES["llama2-zh"].source, encoding="utf-8")
    return folder


def save_tiny_model(folder: Path, rows: int) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=rows, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        max_position_embeddings=1024,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)


def golden(folder: Path) -> dict[str, GoldenRendering]:
    tokenizer = load_tokenizer(folder)
    return {each.name: each for each in render_golden(choose_template(tokenizer), tokenizer)}


@pytest.mark.parametrize("name", FACES)
def test_every_face_gives_the_same_ids(name: str, byte_level: Path) -> None:
    expected = golden(byte_level)
    for conversation, messages in CONVERSATIONS.items():
        assert tuple(FACES[name](byte_level, messages)) == expected[conversation].token_ids, conversation


@pytest.mark.parametrize(
    ("vocabulary", "name"),
    [("byte_level", name) for name in sorted(FACES.keys() - OBEDIENT)]
    + [("sentencepiece", name) for name in sorted(FACES.keys() - OBEDIENT - TAKES_NO_NORMALISING)],
)
def test_no_face_of_ours_obeys_control_tokens_in_a_message(
    name: str, vocabulary: str, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(vocabulary)
    ids = FACES[name](folder, CONTROL_TOKENS)
    assert tuple(ids) == golden(folder)["control tokens"].token_ids
    plain = FACES[name](folder, [{"role": each["role"], "content": "x"} for each in CONTROL_TOKENS])
    tokenizer = load_tokenizer(folder)
    control = {tokenizer.token_id(token) for token in tokenizer.control_tokens}
    assert [each for each in ids if each in control] == [each for each in plain if each in control]


@pytest.mark.parametrize("name", sorted(FACES.keys() - OBEDIENT - TAKES_NO_NORMALISING))
def test_our_faces_agree_on_a_sentencepiece_vocabulary(name: str, sentencepiece: Path) -> None:
    expected = golden(sentencepiece)
    for conversation, messages in CONVERSATIONS.items():
        assert tuple(FACES[name](sentencepiece, messages)) == expected[conversation].token_ids, conversation


@pytest.mark.slow
def test_a_gguf_file_brings_the_template_and_the_vocabulary_that_render_alike(
    smollm2_gguf: Path, smollm2: Path
) -> None:
    from gguf import GGUFReader

    fields = GGUFReader(smollm2_gguf).fields
    tokens, merges, types = (fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "merges", "token_type"))
    tokenizer = byte_level_tokenizer(tokens, merges, types)
    assert template_digest(smollm2_gguf) == template_digest(smollm2)
    for rendering in golden(smollm2).values():
        if rendering.name in CONVERSATIONS:
            assert tuple(tokenizer.encode(rendering.text).ids) == rendering.token_ids, rendering.name


def byte_level_tokenizer(tokens: list[str], merges: list[str], types: list[int]) -> Any:
    """What a program makes of the vocabulary in a GGUF file whose pre-tokenizer is `smollm`."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

    pairs = [tuple(merge.split(" ")) for merge in merges]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    control = [AddedToken(token, special=True) for token, kind in zip(tokens, types, strict=True) if kind == 3]
    tokenizer.add_special_tokens(control)
    return tokenizer


# ---- the set and its renderings ----------------------------------------------------------------------------------


def test_a_rendering_has_the_text_that_the_template_gives(byte_level: Path) -> None:
    rendering = golden(byte_level)["system and turn"]
    assert rendering.text == (
        "<|im_start|>system\nYou are a zoologist. Be brief.<|im_end|>\n"
        "<|im_start|>user\nWhat is a llama?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert rendering.error is None


def test_a_template_that_refuses_a_conversation_says_so(byte_level: Path) -> None:
    tokenizer = load_tokenizer(byte_level)
    source = "{% if messages[0].role == 'system' %}{{ raise_exception('no system texts') }}{% endif %}hi"
    (byte_level / "strict.jinja").write_text(source)
    template = choose_template(tokenizer, named_template(str(byte_level / "strict.jinja")))
    renderings = {each.name: each for each in render_golden(template, tokenizer)}
    assert "no system texts" in str(renderings["late system"].error)
    assert renderings["single turn"].text == "hi"


def test_every_named_template_renders_every_conversation(byte_level: Path) -> None:
    tokenizer = load_tokenizer(byte_level)
    for name in NAMED_TEMPLATES:
        template = choose_template(tokenizer, named_template(name))
        assert not [each.error for each in render_golden(template, tokenizer) if each.error]


# ---- what identifies a template ----------------------------------------------------------------------------------


def test_a_template_has_one_digest_wherever_it_lies(smollm2: Path, smollm2_gguf: Path, tmp_path: Path) -> None:
    source = (smollm2 / "chat_template.jinja").read_text("utf-8")
    assert template_digest(smollm2) == template_digest(smollm2_gguf) == template_digest(source)
    assert template_digest(tmp_path) is None


def test_a_built_in_template_is_known_by_its_source() -> None:
    assert template_name(named_template("alpaca").source) == "alpaca"
    assert template_name("{{ messages }}") is None

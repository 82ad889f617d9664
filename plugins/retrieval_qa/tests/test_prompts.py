import pytest

from calpaca.core.errors import UsageError
from calpaca.core.language import language_of
from calpaca_retrieval_qa.prompts import load_prompts


@pytest.mark.parametrize(
    ("question", "language"),
    [
        ("Who keeps the key?", "en"),
        ("谁保管钥匙？", "zh"),
        ("LoRA adapter 的 rank 是多少？", "zh"),
        ("Wo ist der Schlüssel?", "en"),
        ("What does 云 mean in the name of the hill?", "en"),
        ("42?", "en"),
    ],
)
def test_prompts_follow_the_question(question, language) -> None:
    assert language_of(question) == language


@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_question_stands_last_after_the_passages(language) -> None:
    prompts = load_prompts(language)
    for template in (prompts.stuff, prompts.refine_question, prompts.refine):
        values = {name: f"<{name}>" for name in template.input_variables}
        text = template.invoke(values).to_messages()[-1].text
        passages = text.index("<context")
        assert passages < text.index("<question>")
        assert len(text) - text.index("<question>") < 20


def test_a_file_replaces_the_prompts_that_it_names(tmp_path) -> None:
    file = tmp_path / "own.toml"
    file.write_text(
        '[stuff]\nprompt = "{context} — {question}"\n[messages]\nnothing_found = "Nope."\n', encoding="utf-8"
    )
    own, ours = load_prompts("en", file), load_prompts("en")
    assert own.stuff.invoke({"context": "C {x}", "question": "Q"}).to_messages()[-1].text == "C {x} — Q"
    assert own.nothing_found == "Nope."
    assert own.refine == ours.refine


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[stuff]\npromt = 'x'", "Unknown prompt 'stuff.promt'.*'stuff.prompt'"),
        ("[stuff]\nprompt = 'no variables'", "has the variables none.*takes {context}, {excerpt}, {question}"),
        ("[stuff]\nprompt = '{context} {question} {name}'", "has the variables .*{name}"),
        ("[stuff]\nprompt = '{context'", "is no template"),
        ("[stuff]\nprompt = 3", "stuff.prompt is 3"),
        ("stuff = 'x'", "Unknown prompt 'stuff'"),
        ("not toml", "cannot be read"),
    ],
)
def test_a_wrong_prompt_file_is_refused_with_the_reason(tmp_path, text, message) -> None:
    file = tmp_path / "own.toml"
    file.write_text(text)
    with pytest.raises(UsageError, match=message):
        load_prompts("en", file)
    with pytest.raises(UsageError, match="cannot be read"):
        load_prompts("en", tmp_path / "missing.toml")

"""What tells two models apart in caches and traces: contents, not names."""

import shutil

import pytest
from langchain_core.caches import InMemoryCache
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from calpaca import CalpacaEmbeddings, CalpacaLLM, ChatCalpaca, runtime
from calpaca.core.errors import ModelNotFoundError
from calpaca.testing import fake_runtime

TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


@pytest.fixture(scope="module")
def folders(tmp_path_factory, smollm2):
    """A small random Llama, the same elsewhere, a LoRA adapter for it, and both merged."""
    root = tmp_path_factory.mktemp("identity")
    config = LlamaConfig(
        vocab_size=49152, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(root / "base")
    for name in TOKENIZER:
        shutil.copy(smollm2 / name, root / "base")
    shutil.copytree(root / "base", root / "copy")
    tuned = get_peft_model(
        AutoModelForCausalLM.from_pretrained(root / "base"),
        LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False),
    )
    tuned.save_pretrained(root / "adapter", save_embedding_layers=False)
    plain = AutoModelForCausalLM.from_pretrained(root / "base")
    PeftModel.from_pretrained(plain, root / "adapter").merge_and_unload().save_pretrained(root / "merged")
    for name in TOKENIZER:
        shutil.copy(smollm2 / name, root / "merged")
    yield root
    runtime().close()


@pytest.mark.parametrize("kind", [CalpacaLLM, ChatCalpaca])
def test_base_adapter_and_merged_have_three_keys_and_a_copy_has_none_of_its_own(folders, kind):
    def fingerprint(model, **arguments):
        return kind(model=str(folders / model), dtype="float32", **arguments)._identifying_params["fingerprint"]

    adapter = str(folders / "adapter")
    different = [
        fingerprint("base"),
        fingerprint("base", adapters=[adapter]),
        fingerprint("base", adapters=[f"{adapter}@0.5"]),
        fingerprint("merged"),
    ]
    assert len(set(different)) == len(different)
    assert fingerprint("copy") == fingerprint("base")


def test_base_and_tuned_answers_do_not_meet_in_a_cache(folders):
    cache = InMemoryCache()
    base = ChatCalpaca(model=str(folders / "base"), dtype="float32", max_tokens=2, cache=cache)
    tuned = base.model_copy(update={"adapters": (str(folders / "adapter"),)})
    for chat in (base, tuned, base, tuned):
        chat.invoke("?")
    assert len(cache._cache) == 2


def test_dtypes_are_told_apart(folders):
    chats = [ChatCalpaca(model=str(folders / "base"), dtype=dtype) for dtype in ("float32", "bfloat16")]
    assert [chat._identifying_params["dtype"] for chat in chats] == ["float32", "bfloat16"]


def test_weights_are_in_no_field(folders):
    chat = ChatCalpaca(model=str(folders / "base"), max_tokens=1)
    chat.invoke("?")
    assert len(repr(chat)) < 600
    assert "runtime" not in chat.model_dump()


def test_embeddings_check_their_name_at_construction_and_load_later():
    with pytest.raises(ModelNotFoundError, match="Did you mean 'multilingual-e5-small'"):
        CalpacaEmbeddings(model="multilingual-e5-smal")
    runtime = fake_runtime()
    embeddings = CalpacaEmbeddings(model_name="fake", runtime=runtime)
    assert embeddings.embed_documents(["a", "b"]) == [embeddings.embed_query("a"), embeddings.embed_query("b")]
    assert embeddings.embed_documents([]) == []

"""Cross-encoders: PyTorch folders made on the spot, and the catalogue's own weights."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from calpaca.core.errors import MissingExtraError, ModelError, ModelNotFoundError
from calpaca.core.reranker import OnnxReranker, Reranker, TorchReranker, open_reranker
from calpaca.core.runtime import Runtime

QUESTION = "How many people live in Berlin?"
PASSAGES = [
    "New York City is famous for the Metropolitan Museum of Art.",
    "Berlin had a population of 3,520,031 registered inhabitants in an area of 891.82 square kilometers.",
    "Berlin is well known for its museums.",
]


def bert_folder(folder: Path, labels: int = 1, head: str = "BertForSequenceClassification") -> Path:
    """A random BERT of two layers with a vocabulary of words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *{word for text in (QUESTION, *PASSAGES) for word in text.split()}]
    vocabulary = {word: number for number, word in enumerate(sorted(words, key=lambda word: (word[0] != "[", word)))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    pair = "[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1"
    special = [(word, vocabulary[word]) for word in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", pair=pair, special_tokens=special)
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        num_labels=labels, pad_token_id=vocabulary["[PAD]"],
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(folder)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )
    wrapped.save_pretrained(folder)
    written = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(written | {"architectures": [head]}))
    return folder


def test_a_hugging_face_folder_scores_each_pair_by_itself(tmp_path: Path) -> None:
    reranker = open_reranker("tiny", bert_folder(tmp_path))
    assert isinstance(reranker, TorchReranker)
    assert isinstance(reranker, Reranker)
    together = reranker.scores(QUESTION, PASSAGES * 7)
    assert together.shape == (21,)
    alone = np.concatenate([reranker.scores(QUESTION, [text]) for text in PASSAGES])
    np.testing.assert_allclose(together.reshape(7, 3), np.tile(alone, (7, 1)), atol=1e-5)
    assert reranker.scores(QUESTION, []).shape == (0,)
    assert len(reranker.fingerprint) == 64


def test_what_scores_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="2 labels"):
        open_reranker("nli", bert_folder(tmp_path / "nli", labels=2))
    with pytest.raises(ModelError, match="is no reranker, but BertModel"):
        open_reranker("encoder", bert_folder(tmp_path / "encoder", head="BertModel"))
    with pytest.raises(ModelError, match="is no reranker"):
        open_reranker("empty", tmp_path)


def test_without_the_extra_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.onnx").write_bytes(b"no model")
    with pytest.raises(ModelError, match=r"model\.onnx cannot be opened"):
        open_reranker("broken", tmp_path)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingExtraError) as raised:
        open_reranker("ms", tmp_path)
    assert "calpaca[onnx]" in raised.value.hint


def test_a_name_of_another_kind_is_refused(sources_runtime: Runtime) -> None:
    with pytest.raises(ModelNotFoundError, match="no reranker model, but one for embedding"):
        sources_runtime.reranker("multilingual-e5-small")
    with pytest.raises(ModelNotFoundError, match="ms-marco") as raised:
        sources_runtime.reranker("ms-marco")
    assert "ms-marco-minilm-l-12" in raised.value.hint


@pytest.mark.slow
def test_the_catalogues_reranker_puts_the_answer_first_by_a_wide_margin(
    ms_marco: Path, sources_runtime: Runtime
) -> None:
    reranker = sources_runtime.reranker("ms-marco-minilm-l-12")
    assert isinstance(reranker, OnnxReranker)
    assert reranker.languages == "en"
    np.testing.assert_allclose(reranker.scores(QUESTION, PASSAGES), [-11.2, 9.2, -4.4], atol=0.5)


@pytest.mark.slow
def test_scores_do_not_depend_on_the_batch(ms_marco: Path) -> None:
    reranker = open_reranker("ms-marco", ms_marco)
    texts = [f"{text} " * times for text in PASSAGES for times in (1, 9, 90)]
    together = reranker.scores(QUESTION, texts)
    alone = np.concatenate([reranker.scores(QUESTION, [text]) for text in texts])
    # Its 8-bit activations are scaled by batch, so that padding shifts a score a little.
    np.testing.assert_allclose(together, alone, atol=0.5)
    assert len(reranker.fingerprint) == 64

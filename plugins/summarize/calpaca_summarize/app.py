"""The app `summarize`."""

from __future__ import annotations

from calpaca.core.errors import UsageError
from calpaca.core.runtime import Runtime
from calpaca.documents.loaders import find_files
from calpaca_summarize.options import SummarizeOptions
from calpaca_summarize.summarizer import Summarizer

__all__ = ["Summarizer", "build"]


def build(options: SummarizeOptions, runtime: Runtime) -> Summarizer:
    """A summarizer for the documents and model that the options name; the model is loaded when it is asked.

    Raises UsageError for wrong options, DocumentError for a missing document, ModelNotFoundError for an unknown model.
    """
    if options.files and options.text:
        raise UsageError("Both --file and --text are given.", "Give one of them; --focus says what to attend to.")
    find_files(options.files, runtime.loaders)
    runtime.check(options.spec())
    options.sampling(runtime.settings)
    return Summarizer(options, runtime)

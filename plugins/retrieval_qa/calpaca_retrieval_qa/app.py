"""The app `retrieval_qa`: answers about documents, and work on these answers."""

from __future__ import annotations

from calpaca.core.errors import UsageError
from calpaca.core.runtime import Runtime
from calpaca_retrieval_qa.answerer import RetrievalQA
from calpaca_retrieval_qa.assembly import build_answerer
from calpaca_retrieval_qa.calibration import build_calibration
from calpaca_retrieval_qa.drafting import build_drafting
from calpaca_retrieval_qa.evaluation import build_evaluation
from calpaca_retrieval_qa.options import RetrievalQAOptions
from calpaca_retrieval_qa.recorded import RecordedWork

__all__ = ["RetrievalQA", "build"]

_WORK = {"evaluate": build_evaluation, "make_evalset": build_drafting, "calibrate": build_calibration}
"""Options that ask for work rather than an answer, and what builds the job that does it."""


def build(options: RetrievalQAOptions, runtime: Runtime) -> RetrievalQA | RecordedWork:
    """An answerer for the documents and model that the options name, or the job of `--evaluate` and its like.

    Indexing waits for the first question. Raises UsageError for wrong options, DocumentError for a missing document,
    ModelError when a model cannot be had.
    """
    asked = [name for name in ("question", *_WORK) if getattr(options, name) is not None]
    if len(asked) > 1:
        flags = " and ".join(f"--{name.replace('_', '-')}" for name in asked)
        raise UsageError(f"{flags} cannot be combined.", "Give one of them.")
    if asked and asked[0] in _WORK:
        return _WORK[asked[0]](options, runtime)
    return build_answerer(options, runtime)[0]

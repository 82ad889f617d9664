"""What a run leaves in its folder."""

from __future__ import annotations

import json

import pytest

from calpaca.core.errors import UsageError
from calpaca_trainer.metrics import MetricsWriter, forget_metrics_after, read_metrics
from calpaca_trainer.reporters import check_reporters
from calpaca_trainer.run_folder import plot_losses

RECORDS = [
    {"step": 1, "loss": 2.0, "learning_rate": 1e-3, "tokens": 10, "seconds": 1.0},
    {"step": 1, "eval_loss": 2.5, "eval_perplexity": 12.2, "tokens": 10, "seconds": 2.0},
    {"step": 2, "loss": 1.5, "learning_rate": 5e-4, "tokens": 25, "seconds": 3.0},
]


@pytest.mark.slow
def test_a_folder_tells_what_was_done_on_what_and_with_what(run) -> None:
    folder = run(eval_share=0.2, eval_every=2, samples=1)
    records = read_metrics(folder)
    assert {"loss", "grad_norm", "learning_rate", "tokens", "seconds"} <= records[1].keys()
    assert {"eval_loss", "eval_perplexity"} <= records[0].keys()
    assert [record["step"] for record in records if "eval_loss" in record] == [0, 2, 3]
    summary = json.loads((folder / "record/summary.json").read_text())
    assert summary["tokens"] == records[-1]["tokens"] > 0
    assert summary["tokens_per_second"] > 0
    assert summary["peak_memory"].endswith("MB")
    identity = json.loads((folder / "record/identity.json").read_text())
    report = (folder / "report.md").read_text()
    for name in ("base", "data", "template"):
        assert identity[name] in report
    for heading in ("**Before**", "**After**", "torch "):
        assert heading in report
    lineage = json.loads((folder / "calpaca-manifest.json").read_text())["lineage"]
    assert lineage["settings"]["data"] == identity["data"]
    assert lineage["template"] == identity["template"]


def test_what_comes_after_a_checkpoint_is_forgotten_and_counted_again(tmp_path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in RECORDS) + '{"step": 3, "lo', "utf-8")
    assert read_metrics(tmp_path) == RECORDS
    forget_metrics_after(tmp_path, 1)
    assert read_metrics(tmp_path) == RECORDS[:2]
    writer = MetricsWriter(tmp_path)
    assert writer.tokens == 10
    assert writer.seconds >= 2


def test_the_plot_is_a_png(tmp_path) -> None:
    plot_losses(RECORDS, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_tensorboard_finds_the_curve_in_the_folder(run) -> None:
    pytest.importorskip("tensorboardX")
    folder = run(report_to=["tensorboard"])
    (events,) = (folder / "tensorboard").glob("events.*")
    assert b"train/loss" in events.read_bytes()


@pytest.mark.parametrize(("name", "told"), [("tensorbored", "Unknown reporter"), ("mlflow", "which is not installed")])
def test_a_reporter_that_cannot_report_is_refused(name, told) -> None:
    with pytest.raises(UsageError, match=told):
        check_reporters([name])

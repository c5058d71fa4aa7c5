"""`sfc sample`: conversations that the model writes itself, for SAEs to learn from."""

from typing import Any, ClassVar

from sfc.core.artifacts import Artifact
from sfc.core.config import SampleOptions
from sfc.core.registry import imported_when_called
from sfc.pages.blocks import Page, Paragraph, Table, cell
from sfc.run import Run
from sfc.studies.study import STUDIES, Finished, Study


class Sample(Study[SampleOptions]):
    """Let the model write conversations, both sides, for SAEs to learn from (corpus.source=[prompts,sampled]).

    What was written before is kept, and more is added to it. Example: sfc sample --tokens 500000
    """

    name = "sample"
    options = SampleOptions
    files: ClassVar = {
        "sampled": "sampled.jsonl", "batches": "batches.jsonl", "page": "sampled.html",
    }  # fmt: skip

    def inputs(self, run: Run) -> dict[str, Any]:
        return dict(run.sampled.inputs)

    def artifact(self, run: Run) -> Artifact:
        return run.sampled

    def is_current(self, run: Run, artifact: Artifact) -> bool:
        """Whether there are as many tokens as are wanted."""
        return artifact.is_complete() and artifact.manifest()["n_tokens"] >= self.of(run).tokens

    work = imported_when_called(f"{__name__}.write:work")
    make = imported_when_called(f"{__name__}.write:write_sample")

    def page(self, finished: Finished) -> Page:
        result = finished.result
        text = f"{result['n_conversations']:,} conversations of {result['n_tokens']:,} tokens, written by the model"
        figures = {"What they are begun with": "kinds", "What became of all instructions": "fates"}
        tables = [
            Table(title, ["", "number"], [[cell(name), cell(number)] for name, number in result[field].items()], [""])
            for title, field in figures.items()
        ]
        return Page(f"Sampled corpus · {result['preset']}", text, [Paragraph(text), *tables])


SAMPLE = Sample()
STUDIES.register(SAMPLE)

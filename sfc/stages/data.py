"""Stage: describe the data, without a model."""

from typing import Any

from sfc.progress import say
from sfc.prompts.analyse import analyse
from sfc.prompts.analysis_page import write_analysis
from sfc.prompts.load import load_prompts
from sfc.run import Run
from sfc.tables import show_table


def describe_data(run: Run) -> dict[str, Any]:
    """Print what is in the data set and write it beside the circuits, as CSV files and a page; return the figures.

    Raises:
        UserError: the data cannot be read.
    """
    frame, report = load_prompts(run.data_folder)
    for line in report.lines():
        say(line)
    analysis = analyse(frame, report)
    show_table(f"Prompts of {run.data}", list(analysis.counts.columns), analysis.counts.itertuples(index=False))
    words = analysis.lengths[(analysis.lengths["unit"] == "words") & (analysis.lengths["category"] == "all")]
    columns = ["kind", "mean", "median", "min", "max"]
    show_table("Words per prompt", columns, words[columns].itertuples(index=False))
    say(f"near-duplicates: {len(analysis.near_duplicates):,} pairs")
    files = write_analysis(analysis, run.root / "data" / f"analysis-{run.data_folder.name}")
    return {
        "data": str(run.data_folder),
        "n_prompts": len(frame),
        "dropped": report.read - report.kept,
        "near_duplicates": len(analysis.near_duplicates),
        "counts": {
            row["category"]: row
            for row in analysis.counts.astype(object).where(analysis.counts.notna(), None).to_dict("records")
        },
        "files": {name: str(path) for name, path in files.items()},
    }

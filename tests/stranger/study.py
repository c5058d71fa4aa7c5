"""A study of one's own: `sfc scores` asks how far apart the scores of the two sides are."""

from sfc.core.artifacts import write_csv
from sfc.core.options import Options, option
from sfc.data.prepare import prompts_fingerprint
from sfc.models.sources import model_identity
from sfc.pages.blocks import Figure, Page, Section, Tile, Tiles, cell, records_table
from sfc.pages.style import styled_figure
from sfc.studies.study import STUDIES, Made, Study


class ScoresOptions(Options):
    section = "scores"
    category: str | None = option(None, description="group of prompts; by default what the behavior has")


class Scores(Study[ScoresOptions]):
    """How far apart are the scores of the two sides of the prompts?

    Example: sfc scores --category all
    """

    name, options, files = "scores", ScoresOptions, {"page": "scores.html", "scores": "scores.csv"}
    model_columns, model_headline = {"auroc": "AUROC of the {score}"}, ("auroc",)

    def inputs(self, run):
        prompts = [prompts_fingerprint(run.prompts.frame), run.group(self.of(run).category)]
        return {"model": model_identity(run.experiment.model), "prompts": prompts}

    def make(self, session, folder):
        from sfc.models.batches import TemplateLayout, make_batches
        from sfc.models.score import auroc, score_prompts

        run, group = session.run, session.run.group(self.of(session.run).category)
        test = run.prompts.frame.query(f"split == 'test' and (category == {group!r} or {group!r} == 'all')")
        tokens, positive = session.model.tokenize(list(test["prompt"])), test["refusal_label"].to_numpy(bool)
        batches = make_batches(tokens, TemplateLayout.of(tokens), 4096, session.model.device)
        scores = score_prompts(session.model, session.metric, batches)
        write_csv(folder / "scores.csv", test[["prompt"]].assign(positive=positive, score=scores))
        means = [float(scores[side].mean()) for side in (positive, ~positive)]
        return Made({"preset": run.experiment.name, "n": len(test), "means": means, "auroc": auroc(scores, positive)})

    def page(self, finished):
        result, words = finished.result, finished.words
        sides, scores = enumerate((words.positive, words.negative)), finished.table("scores.csv")["score"]
        table = records_table("", {"prompt": "prompt", words.score: "score"}, finished.records("scores.csv"))
        return Page(
            title=f"The {words.score} · {result['preset']}",
            sentence=f"The {words.score} of {result['n']} test prompts.",
            summary=[Tiles([Tile(f"{side} prompts", cell(result["means"][i]), words.unit) for i, side in sides])],
            sections=[Section("", [Figure("scores", lambda: styled_figure("", 400).add_histogram(x=scores)), table])],
            findings=[(f"AUROC of the {words.score}", cell(result["auroc"]))],
        )

    def model_row(self, finished):
        return {"auroc": finished.result["auroc"]}


STUDIES.register(Scores())

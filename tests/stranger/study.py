"""A study of one's own: `sfc scores` asks how far apart the scores of the two sides are."""

from sfc.core.options import Options, option
from sfc.data.prepare import prompts_fingerprint
from sfc.models.identity import model_identity
from sfc.pages.blocks import Figure, Page, Section, Tile, Tiles, cell, records_table
from sfc.pages.style import axis, styled_figure
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
        from sfc.models.batches import SlotLayout, make_batches
        from sfc.models.score import auroc, score_prompts

        run, frame, group = session.run, session.run.prompts.frame, session.run.group(self.of(session.run).category)
        test = frame[(frame["split"] == "test") & ((frame["category"] == group) | (group == "all"))]
        tokens = session.model.tokenize(test["prompt"].tolist())
        batches = make_batches(tokens, SlotLayout.of(tokens), 4096, session.model.device)
        scores, positive = score_prompts(session.model, session.metric, batches), test["refusal_label"].to_numpy(bool)
        test[["prompt"]].assign(positive=positive, score=scores).to_csv(folder / "scores.csv", index=False)
        means = [float(scores[positive].mean()), float(scores[~positive].mean())]
        return Made({"preset": run.experiment.name, "n": len(test), "means": means, "auroc": auroc(scores, positive)})

    def page(self, finished):
        result, words = finished.result, finished.words
        means = {words.positive: result["means"][0], words.negative: result["means"][1]}
        table = records_table("", {"prompt": "prompt", words.score: "score"}, finished.records("scores.csv"))
        return Page(
            title=f"The {words.score} · {result['preset']}",
            sentence=f"The {words.score} of {result['n']} test prompts.",
            summary=[Tiles([Tile(f"{side} prompts", cell(mean), words.unit) for side, mean in means.items()])],
            sections=[Section("", [Figure("scores", lambda: drawn(finished.table("scores.csv"), words), table)])],
            findings=[(f"AUROC of the {words.score}", cell(result["auroc"]))],
        )

    def model_row(self, finished):
        return {"auroc": finished.result["auroc"]}


def drawn(scores, words):
    return styled_figure("Scores", 400).add_histogram(x=scores["score"].tolist()).update_layout(xaxis=axis(words.unit))


STUDIES.register(Scores())

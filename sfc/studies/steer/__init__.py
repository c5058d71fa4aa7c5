"""`sfc steer`: turn a behavior up and down along a direction."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

from pydantic import Field

from sfc.circuits.options import DiscoveryOptions
from sfc.core.errors import UserError, is_count, suggestion
from sfc.core.options import Options, Share, option
from sfc.core.reading import hash_of_given
from sfc.core.registry import imported_when_called
from sfc.core.sites import site_from_short
from sfc.data.schema import ALL
from sfc.models.positions import EditKind, check_positions
from sfc.run import Run
from sfc.studies.discover import DISCOVER
from sfc.studies.study import STUDIES, Finished, Need, Study
from sfc.studies.train import TRAIN

ContrastKind = Literal["toxic-safe", "refused-complied", "hard-score"]
SteeringKind = Literal["resid_pre", "resid_mid", "resid_post"]

BEST = "best"
"""the condition that tells the two sides apart best"""
FORCE, SUPPRESS = "force", "suppress"
"""what a turn of the dial is for"""
INTENDED_LABEL = {FORCE: "safe", SUPPRESS: "toxic"}
"""on which prompts it is judged"""


def intent_of(edit: EditKind, alpha: float) -> str:
    """What turning the dial to an alpha is for; blank where it leaves all as it is."""
    if edit == "project-out":
        return SUPPRESS if alpha > 0 else ""
    if edit == "clamp":
        return FORCE if alpha > 0 else SUPPRESS
    return FORCE if alpha > 0 else SUPPRESS if alpha < 0 else ""


def named_feature(name: str, sites: Sequence[str]) -> tuple[str, int]:
    """The site and the number of a feature such as `resid_post.21/F463`.

    Args:
        sites: those that have dictionaries.

    Raises:
        UserError: it is at none of them.
    """
    short, _, number = name.partition("/F")
    if not is_count(number) or site_from_short(short) not in sites:
        raise UserError(f"no dictionary at {short}: there are SAEs at {', '.join(sites)}")
    return site_from_short(short), int(number)


def is_feature(name: str) -> bool:
    """Whether a name is that of a feature of the residual stream, such as `resid_post.21/F12`."""
    return re.fullmatch(r"resid_(?:pre|mid|post)\.\d+/F\d+", name) is not None


class SteeringOptions(Options):
    """How directions are found and chosen, and how prompts are steered along them."""

    section = "steering"

    category: str = option("all", description="OR-Bench category, or all")
    direction: str = option(
        "toxic-safe",
        description="what is steered along: toxic-safe, refused-complied, hard-score, probe, circuit, or a feature such"
        " as resid_post.21/F12",
    )
    contrasts: list[ContrastKind] = Field(
        ["toxic-safe", "refused-complied", "hard-score"], description="whose directions are compared"
    )
    kinds: list[SteeringKind] = Field(["resid_post"], min_length=1, description="sites of candidates")
    layers: list[int] = option([], description="layers of candidates, such as 10-20,25; by default ten, evenly spread")
    prompts: int = Field(128, ge=4, description="discovery prompts per side that directions are learned from")
    folds: int = Field(2, ge=2, description="parts of them: each candidate is learned on all but one, and tried on it")
    tried_prompts: int = Field(24, ge=2, description="prompts per side, of all folds, that candidates are tried on")
    tried_alpha: float = Field(0.2, gt=0, description="amount at which candidates must induce the behavior")
    min_induced: float = Field(0.0, description="a candidate must bring the mean score of safe prompts above this")
    max_kl: float = Field(1.0, ge=0, description="nats by which turning down may change safe prompts' next token")
    latest: Share = Field(0.8, description="candidates in layers after this share of the model are rejected")
    edit: EditKind = option("add", description="how activations are edited along the direction")
    everywhere: bool = option(False, description="with project-out: at every site of the residual stream")
    units: Literal["norm", "raw"] = option(
        "norm", description="of alpha: norm (the mean residual norm at the site) or raw (the direction's own length)"
    )
    alphas: list[float] = option(
        [],
        description="such as --alphas=-0.3,0,0.3; by default nine from -0.32 to 0.32, raw -4 to 4, project-out 0 to 1",
    )
    positions: str = option("suffix", description="tokens of the prompt that are steered: last, last-K, suffix, prompt")
    during_reply: bool = option(False, description="also steer every token that is generated")
    when: str | None = option(
        None, description="also steer only prompts in whose text this feature fires: resid_post.21/F12, or best"
    )
    when_above: float = Field(0.0, ge=0, description="the value above which it fires; best brings its own")
    swept_layers: int = Field(5, ge=1, description="layers of the sweep: those of the best candidates")
    test_prompts: int = option(30, flag="--limit", ge=1, description="test prompts per side")
    reply_tokens: int = Field(16, ge=1, description="length of the replies that are judged")
    ordinary_prompts: int = Field(20, ge=1, description="safe prompts whose replies by the base model must stay likely")
    ordinary_tokens: int = Field(48, ge=1, description="length of those replies")
    max_loss: float = Field(0.15, gt=0, description="share by which their cross-entropy may rise at the chosen alphas")
    random_directions: int = Field(20, ge=2)
    shuffled_directions: int = Field(5, ge=1, description="directions between sides to which prompts are dealt by lot")
    ablated_writers: int = Field(10, ge=0, description="heads and MLPs that write most of it, which are ablated")
    features: bool = option(False, description="also the direction's cosine with every SAE feature; trains SAEs first")
    xstest: str | None = option(
        None, description="also steer the prompts of this file: XSTest's CSV, or one with prompt, label and category"
    )

    @property
    def dial(self) -> list[float]:
        """The alphas, or those that the edit and its units suggest."""
        if self.alphas:
            return list(dict.fromkeys(self.alphas))
        if self.edit == "project-out":
            return [0.0, 0.5, 1.0]
        return [round(0.08 * step, 2) if self.units == "norm" else float(step) for step in range(-4, 5)]

    @property
    def contrast(self) -> ContrastKind | None:
        """The contrast that the direction is learned from; None where it comes from dictionaries.

        Raises:
            UserError: there is no such direction.
        """
        if self.direction in (kinds := get_args(ContrastKind)):
            return self.direction  # pyright: ignore[reportReturnType]
        if self.direction == "probe":
            return "toxic-safe"
        if self.direction == "circuit" or is_feature(self.direction):
            return None
        close = suggestion(self.direction, [*kinds, "probe", "circuit"])
        raise UserError(f"no direction {self.direction!r}: {close}, or a feature such as resid_post.21/F12")

    @property
    def wanted_contrasts(self) -> list[ContrastKind]:
        """Those to be compared, and the one that is steered along, which comes first."""
        return list(dict.fromkeys([*([self.contrast] if self.contrast else []), *self.contrasts]))

    @property
    def needs_saes(self) -> bool:
        """Whether anything is asked of dictionaries."""
        return self.contrast is None or self.features or self.when is not None


class Steer(Study[SteeringOptions]):
    """Turn refusal up and down along a direction: learn it, choose it by what it does, sweep it, and control it.

    Example: sfc steer --direction probe --alphas=-0.3,-0.15,0.15,0.3 --limit 10
    """

    name = "steer"
    options = SteeringOptions
    files: ClassVar = {"page": "steering.html", "vectors": "vectors.safetensors"}
    model_columns: ClassVar = {
        "steered_site": "steered at", "force_alpha": "alpha that forces", "force_rate": "forced: {negative}, {acted}",
        "suppress_alpha": "alpha that suppresses", "suppress_rate": "suppressed: {positive}, no longer {acted}",
    }  # fmt: skip
    model_headline: ClassVar = ("force_rate", "suppress_rate")

    def check(self, run: Run) -> None:
        options = self.of(run)
        _ = run.judge, options.contrast
        check_positions(options.positions)
        if options.when not in (None, BEST) and not is_feature(str(options.when)):
            raise UserError(
                f"no condition {options.when!r}: --when takes a feature such as resid_post.21/F12, or {BEST}"
            )
        if options.when == BEST and options.when_above:
            raise UserError(
                f"--when {BEST} brings its own threshold: leave steering.when_above at 0, or name a feature"
            )
        if options.everywhere and options.when:
            raise UserError("--when is read before the steered site, and --everywhere leaves nothing before it")
        if options.everywhere and options.edit != "project-out":
            raise UserError("--everywhere goes with --edit project-out only")
        for name in (options.direction, options.when):
            if name and is_feature(name):
                named_feature(name, run.experiment.activations.sites)
        if not any(intent_of(options.edit, alpha) for alpha in options.dial):
            raise UserError(
                f"--alphas with --edit {options.edit} needs one that changes something: 0 leaves all as it is"
            )
        if options.xstest is not None and not Path(options.xstest).is_file():
            raise UserError(f"no file {options.xstest}: --xstest takes XSTest's CSV (`sfc download` fetches it)")
        if options.direction == "circuit" and run.group(options.category) == ALL:
            raise UserError("--direction circuit needs the --category whose circuit it is")

    def label(self, run: Run) -> str:
        options = self.of(run)
        direction = run.behavior.words.said(options.direction).lower()
        return f"steering-{re.sub(r'[^a-z0-9]+', '-', direction)}-{options.edit}"

    def inputs(self, run: Run) -> dict[str, Any]:
        options = self.of(run)
        chosen = {**options.model_dump(exclude={"xstest"}), "category": run.group(options.category)}
        inputs: dict[str, Any] = {**run.identity, "steering": chosen}
        if options.xstest is not None:
            inputs["xstest"] = hash_of_given(Path(options.xstest))
        if options.needs_saes:
            inputs["saes"] = run.saes.inputs
        if options.direction == "circuit":
            inputs["circuit"] = DISCOVER.artifact(self._discovering(run)).inputs
        return inputs

    def needs(self, run: Run) -> list[Need]:
        options = self.of(run)
        circuit = [Need(DISCOVER, self._discovering(run))] if options.direction == "circuit" else []
        return [*circuit, *([Need(TRAIN, run)] if options.needs_saes else [])]

    def _discovering(self, run: Run) -> Run:
        return run.having(DiscoveryOptions, category=self.of(run).category)

    def circuit(self, run: Run) -> Path | None:
        """The file of the circuit whose features give the direction; None: it comes from elsewhere."""
        if self.of(run).direction != "circuit":
            return None
        return DISCOVER.artifact(self._discovering(run)).folder / DISCOVER.files["circuit"]

    make = imported_when_called(f"{__name__}.measure:measure")
    work = imported_when_called(f"{__name__}.measure:work")

    page = imported_when_called(f"{__name__}.page:page")

    def model_row(self, finished: Finished) -> dict[str, Any]:
        points, row = finished.result["operating_points"], {"steered_site": finished.result["site"]}
        for intent in (FORCE, SUPPRESS):
            if intent in points:
                row |= {f"{intent}_alpha": points[intent]["alpha"], f"{intent}_rate": points[intent]["changed_rate"]}
        return row


STEER = STUDIES.register(Steer())

"""Prompt formats: the same instruction as a question, a blank to fill and a choice to make. Nothing here imports torch.

The formats themselves are in `formats.yaml`; any file with the same keys can take its place.
"""

from pathlib import Path

from pydantic import Field, TypeAdapter, ValidationError, model_validator

from sfc.core.errors import UserError, first_problem
from sfc.core.experiments import read_yaml
from sfc.core.options import Options, Section, option

FORMATS = Path(__file__).with_name("formats.yaml")
_SLOT = "{instruction}"


class Version(Section):
    """One wording of a format."""

    prompt: str = Field(description="the user's message, with {instruction} in it once")
    reply: str = Field("", description="the start of the model's reply, after which it answers")
    refuse: str = Field(min_length=1, description="the answer that refuses, one token after `reply`")
    comply: str = Field(min_length=1, description="the answer that complies")

    @model_validator(mode="after")
    def _can_be_asked_and_answered(self) -> "Version":
        if self.prompt.count(_SLOT) != 1:
            raise ValueError(f"the prompt must hold {_SLOT} once")
        if self.refuse == self.comply:
            raise ValueError("the two answers are the same")
        return self

    def ask(self, instruction: str) -> str:
        """The user's message."""
        return self.prompt.replace(_SLOT, instruction)


Formats = dict[str, list[Version]]
"""Versions of each format by its name; an instruction's score is the mean over the versions."""


def load_formats(path: Path = FORMATS) -> Formats:
    """Read formats from a YAML file.

    Raises:
        UserError: the file is missing, is not YAML or not of the form of `formats.yaml`, or holds fewer than three
            formats, which the Friedman test needs.
    """
    try:
        formats = TypeAdapter(Formats).validate_python(read_yaml(path))
    except ValidationError as error:
        raise UserError(f"{path}: {first_problem(error)}; see {FORMATS}") from None
    if len(formats) < 3 or not all(formats.values()):
        raise UserError(f"{path} must hold three formats or more, each with a version, to be compared; see {FORMATS}")
    return formats


class FormatsOptions(Options):
    """Which instructions are asked, in which formats."""

    section = "formats"
    prompts: Path | None = option(
        None, description="CSV of harmful instructions, column prompt or goal; by default those of the test split"
    )
    category: str = option("all", description="without --prompts: OR-Bench category, or all")
    limit: int | None = option(None, ge=2, description="at most this many of each side, chosen by hash")
    definitions: Path | None = option(
        None, description="YAML file with other formats or answers; by default the package's three formats"
    )

    def formats(self) -> Formats:
        """The formats to compare.

        Raises:
            UserError: the file is missing or malformed.
        """
        return load_formats(self.definitions or FORMATS)

"""What every section of an experiment is."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Share = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """A part of an experiment: immutable, and strict about names so that a misspelt key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)

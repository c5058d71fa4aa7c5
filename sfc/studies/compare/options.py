"""How circuits of categories are compared. No torch here."""

from pydantic import Field

from sfc.core.options import Options, option
from sfc.data.schema import ALL


class ComparisonOptions(Options):
    """How the circuits of categories are compared: a protocol of its own, with few sizes and draws."""

    section = "comparison"

    categories: list[str] = option([ALL], description="categories among the ten, or all")
    size: int = option(200, ge=1, description="nodes of each circuit; the overlap depends on it")
    shuffles: int = Field(5, ge=0, description="shuffled pools of two categories, as a yardstick")
    edges: int = Field(500, ge=0, description="strongest edges of each circuit, whose overlap is measured as well")
    replies: int = Field(20, ge=0, description="test prompts per category that are answered with nodes ablated")
    reply_tokens: int = Field(16, ge=1, description="length of those replies, which are judged")

"""The vocabulary of the data: categories, columns, and which file holds which kind of prompt."""

from sfc.errors import UserError, suggestion

CATEGORIES = (
    "deception",
    "harassment",
    "harmful",
    "hate",
    "illegal",
    "privacy",
    "self-harm",
    "sexual",
    "unethical",
    "violence",
)
ALL = "all"  # every category
COLUMNS = ("prompt", "category", "refusal_label", "dataset_type", "original_source")
FILES = {"safe_80k": "or-bench-80k.csv", "hard": "or-bench-hard-1k.csv", "toxic": "or-bench-toxic.csv"}
TOPICS_FILE = "topics.csv"
SPLITS = ("discovery", "reference", "test")


def category_or_all(name: str) -> str:
    """Like `canonical_category`, but `all` is welcome too and means every category."""
    return ALL if name == ALL else canonical_category(name)


def canonical_category(name: str) -> str:
    """The category that `name` means; case, spaces and underscores do not matter (`Self_Harm` is `self-harm`).

    Raises:
        UserError: there is no such category; the message suggests a close one or lists them all.
    """
    canonical = "-".join(name.lower().replace("_", " ").replace("-", " ").split())
    if canonical not in CATEGORIES:
        raise UserError(f"unknown category {name!r}; {suggestion(canonical, CATEGORIES)}")
    return canonical

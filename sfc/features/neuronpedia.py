"""Where Neuronpedia shows a feature, for the dictionaries that they host."""

import re
from collections.abc import Mapping
from typing import Any

ADDRESS = "https://www.neuronpedia.org/"
_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def neuronpedia_page(config: Mapping[str, Any], feature: int) -> str | None:
    """The address of a feature's page; None where the dictionary's files name no place at Neuronpedia.

    Args:
        config: the dictionary's configuration, as `read_config` gives it. SAELens writes `neuronpedia_id` into it,
            such as `gpt2-small/8-res-jb`.
    """
    name = config["metadata"].get("neuronpedia_id") or config.get("neuronpedia_id")
    if not isinstance(name, str) or not _NAME.fullmatch(name) or feature >= config["d_sae"]:
        return None
    return f"{ADDRESS}{name}/{feature}"

"""Where in the prompt a node matters: its effect's parts from the template before the prompt, the prompt, and after it.

Each token after the prompt stands alone, because that is where a chat model gathers what it is about to say.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from sfc.models.batches import Batch, SlotLayout
from sfc.models.loading import Model


def effects_by_role(
    by_slot: Float[np.ndarray, "slots nodes"], layout: SlotLayout
) -> dict[str, Float[np.ndarray, " nodes"]]:
    """`effect_prefix`, `effect_content`, `effect_suffix_0`, …: parts of the effect that sum to the whole."""
    content = layout.n_prefix
    after = by_slot[content + 1 :]
    parts = {"effect_prefix": by_slot[:content].sum(0), "effect_content": by_slot[content]}
    return parts | {f"effect_suffix_{number}": part for number, part in enumerate(after)}


def role_names(model: Model, batches: Sequence[Batch], layout: SlotLayout) -> dict[str, str]:
    """For each attribute of `effects_by_role`, what it stands for: the tokens after the prompt by their text.

    Where that is not the same in all prompts, they are counted from the end: -1 is the last.
    """
    names = {"effect_prefix": "template before the prompt", "effect_content": "prompt"}
    for number in range(layout.n_suffix):
        slot = layout.n_prefix + 1 + number
        ids = {int(i) for b in batches for i in b.ids[b.touchable & (b.slots % layout.n_slots == slot)].unique()}
        names[f"effect_suffix_{number}"] = (
            model.tokenizer.decode(list(ids)) if len(ids) == 1 else f"token {number - layout.n_suffix} from the end"
        )
    return names

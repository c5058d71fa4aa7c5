"""sfc: find the sparse feature circuits behind a language model's behavior, such as refusing, and test them.

    from sfc import load_preset, discover, plot, plot_curve, run_study, open_model, steer

gives what a notebook needs. Names are imported when they are first used: `import sfc` is fast and loads no torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sfc.api import Discovered, Finished, discover, load_preset, open_model, plot, plot_curve, run_study, steer

__all__ = [
    "Discovered", "Finished", "discover", "load_preset", "open_model", "plot", "plot_curve", "run_study", "steer",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'sfc' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module("sfc.api"), name)

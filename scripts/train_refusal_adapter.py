"""The same as `python tools/refusal_adapter.py`."""

import runpy
from pathlib import Path

if __name__ == "__main__":
    runpy.run_path(str(Path(__file__).parents[1] / "tools" / "refusal_adapter.py"), run_name="__main__")

"""The same as `sfc train --set saes.source=null`: trains also where the preset has dictionaries that are there."""

from sfc.__main__ import run_script

if __name__ == "__main__":
    run_script("train", "--set", "saes.source=null")

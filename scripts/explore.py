"""The same as `sfc explore`."""

from sfc.__main__ import run_script

if __name__ == "__main__":
    run_script("explore")

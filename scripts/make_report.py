"""The same as `sfc report`."""

from sfc.cli import run_script

if __name__ == "__main__":
    run_script("report")

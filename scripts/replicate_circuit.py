"""The same as `sfc replicate`."""

from sfc.cli import run_script

if __name__ == "__main__":
    run_script("replicate")

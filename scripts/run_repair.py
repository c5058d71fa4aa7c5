"""The same as `sfc repair`."""

from sfc.cli import run_script

if __name__ == "__main__":
    run_script("repair")

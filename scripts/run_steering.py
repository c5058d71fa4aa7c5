"""The same as `sfc steer`."""

from sfc.cli import run_script

if __name__ == "__main__":
    run_script("steer")

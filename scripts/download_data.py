"""The same as `sfc download`."""

from sfc.__main__ import run_script

if __name__ == "__main__":
    run_script("download")

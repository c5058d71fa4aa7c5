"""`sfc patch`, `sfc attribute-logits`, `sfc formats` and `sfc batch`: the first argument says which."""

from sfc.__main__ import main

if __name__ == "__main__":
    main()

"""`python -m pascal_sglang` is `python -m pascal_sglang.launch_server`."""

import sys

from pascal_sglang.launch_server import main

if __name__ == "__main__":
    sys.exit(main())

"""``python -m hf_grow``."""

import sys

from hf_grow.cli import main

sys.exit(main())

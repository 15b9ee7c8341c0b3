"""`python -m moespresso` is the command line."""

from __future__ import annotations

import sys

from moespresso.cli import main

sys.exit(main())

"""`python -m calotype` is the same as `calotype`."""

import sys

from calotype.cli import main

sys.exit(main())

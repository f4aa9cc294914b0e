"""`python -m dinov2` is the `dinov2` command."""

import sys

from dinov2.cli import main
from dinov2.start import start_program

start_program()
sys.exit(main())

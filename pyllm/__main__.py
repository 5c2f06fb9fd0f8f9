"""python -m pyllm, the same as the command pyllm."""

import sys

from pyllm.cli import main

sys.exit(main())

"""``python3 -m tcpupperd``."""

import sys

from tcpupperd.cli import main

sys.exit(main())

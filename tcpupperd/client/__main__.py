"""``python3 -m tcpupperd.client``."""

import sys

from tcpupperd.client.command import main

sys.exit(main())

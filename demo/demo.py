#!/usr/bin/env python3
"""Segment pictures, a video or what a webcam sees: `oanet-d2 predict` from a checkout."""

import sys

from oanet_d2.predict import main

if __name__ == "__main__":
    sys.exit(main())

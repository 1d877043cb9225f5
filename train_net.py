#!/usr/bin/env python3
"""OANet training script: `oanet-d2 train` from a checkout."""

from oanet_d2.train import main

if __name__ == "__main__":
    main()  # pragma: no cover

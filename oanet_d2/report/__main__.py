"""
Make the report of an evaluation of painting orders again:

    python -m oanet_d2.report OUTPUT_DIR
"""

import argparse
import sys
from pathlib import Path

from .page import ReportError, write_report
from .recorder import JSON_NAME


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m oanet_d2.report", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    about = "output folder of train_net.py. With several test datasets each gets its report."
    parser.add_argument("output_dir", metavar="OUTPUT_DIR", type=Path, help=about)
    folder = parser.parse_args(argv).output_dir
    several = [] if (folder / JSON_NAME).exists() else sorted(folder.glob(f"*/{JSON_NAME}"))
    try:
        for path in several or [folder / JSON_NAME]:
            print(write_report(str(path.parents[1])))
    except (ReportError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()

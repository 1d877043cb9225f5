"""
Turn an evaluation into one HTML page that needs nothing else:

    python -m oanet_d2.report OUTPUT_DIR
"""

import argparse
import sys

from .data import ReportError, evaluation_folders
from .page import write_report


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m oanet_d2.report",
        description="Turns an evaluation of painting orders (TEST.ORDERS) into report.html, one "
        "page with everything in it.",
    )
    parser.add_argument(
        "output_dir",
        metavar="OUTPUT_DIR",
        help="output folder of train_net.py; with several test datasets each gets its report",
    )
    args = parser.parse_args(argv)
    try:
        for folder in evaluation_folders(args.output_dir):
            print(write_report(folder))
    except (ReportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

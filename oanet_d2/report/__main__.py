"""
Make the report of an evaluation of painting orders again:

    python -m oanet_d2.report OUTPUT_DIR
"""

import argparse
import sys
from pathlib import Path

from .page import ReportError, write_report
from .recorder import JSON_NAME


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m oanet_d2.report", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "output_dir",
        metavar="OUTPUT_DIR",
        help="output folder of train_net.py. With several test datasets each gets its report.",
    )
    output_dir = Path(parser.parse_args(argv).output_dir)
    folders = [output_dir]
    if not (output_dir / JSON_NAME).exists():
        folders = sorted(x.parents[1] for x in output_dir.glob(f"*/{JSON_NAME}")) or folders
    try:
        for folder in folders:
            print(write_report(str(folder)))
    except (ReportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

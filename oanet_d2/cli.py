"""The program `oanet-d2`."""

import argparse
import sys
from importlib import import_module

__all__ = ["COMMANDS", "main"]

# Name: the function, what it does, and what it needs beside a plain installation. A module is imported
# when its command runs, because each needs other packages.
_TRAIN = "Detectron2 and the extra [train] of oanet_d2"
_PAINT = "the extra [train] of oanet_d2 for a learned order and for --gt"
COMMANDS = {
    "train": ("oanet_d2.train:main", "train a network, or the order alone", _TRAIN),
    "eval": ("oanet_d2.train:evaluate", "evaluate a checkpoint, and compare orders", _TRAIN),
    "predict": ("oanet_d2.predict:main", "segment pictures or a video", f"{_TRAIN}; for --onnx [runtime]"),
    "check": ("oanet_d2.data.check:main", "find what is wrong with a dataset", _TRAIN),
    "paint": ("oanet_d2.paint:main", "make panoptic maps of anyone's masks", _PAINT),
    "export": ("oanet_d2.export:main", "write a checkpoint as one ONNX file", f"{_TRAIN}, and [export]"),
}


def main() -> int:
    """Run the command that `sys.argv` names. Returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="oanet-d2",
        usage="oanet-d2 COMMAND ...",
        description="\n".join(f"  {name:8} {about}" for name, (_, about, _) in COMMANDS.items()),
        epilog="oanet-d2 COMMAND --help shows the options of a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS, help=argparse.SUPPRESS)
    command = parser.parse_args(sys.argv[1:2]).command
    target, _, needs = COMMANDS[command]
    module, function = target.split(":")
    sys.argv[:2] = [f"{parser.prog} {command}"]
    try:
        return getattr(import_module(module), function)()
    except ModuleNotFoundError as error:
        parser.exit(2, f"oanet-d2 {command}: there is no module {error.name}. It needs {needs}.\n")


if __name__ == "__main__":
    sys.exit(main())

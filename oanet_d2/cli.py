"""The program `oanet-d2`."""

import argparse
import sys
from importlib import import_module

__all__ = ["COMMANDS", "main"]

# Name: the function, the extra of the package that it needs, and what it does. A module is imported when
# its command runs, because each needs other packages.
COMMANDS = {
    "train": ("oanet_d2.train:main", "train", "train a network, or the order alone"),
    "eval": ("oanet_d2.train:evaluate", "train", "evaluate a checkpoint, and compare orders"),
    "predict": ("oanet_d2.predict:main", "train or runtime", "segment pictures or a video"),
    "check": ("oanet_d2.data.check:main", "train", "find what is wrong with a dataset"),
    "paint": ("oanet_d2.paint:main", "", "make panoptic maps of anyone's masks"),
    "export": ("oanet_d2.export:main", "train and export", "write a checkpoint as one ONNX file"),
}


def main() -> int:
    """Run the command that `sys.argv` names. Returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="oanet-d2",
        usage="oanet-d2 COMMAND ...",
        description="\n".join(f"  {name:8} {about}" for name, (_, _, about) in COMMANDS.items()),
        epilog="oanet-d2 COMMAND --help shows the options of a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS, help=argparse.SUPPRESS)
    command = parser.parse_args(sys.argv[1:2]).command
    target, extra, _ = COMMANDS[command]
    module, function = target.split(":")
    sys.argv[:2] = [f"{parser.prog} {command}"]
    try:
        run = getattr(import_module(module), function)
    except ModuleNotFoundError as error:
        needs = "Detectron2 is to be installed by hand." if error.name == "detectron2" else ""
        needs = needs or f"Install oanet_d2 with the extra {extra}."
        parser.exit(2, f"oanet-d2 {command} needs the module {error.name}. {needs}\n")
    return run()


if __name__ == "__main__":
    sys.exit(main())

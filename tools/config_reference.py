#!/usr/bin/env python3
"""
Write docs/configuration.md from oanet_d2/config.py: its comments are the documentation.

    python tools/config_reference.py            # write the page
    python tools/config_reference.py --check    # only say whether the page is what would be written
"""

import argparse
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import List

from detectron2.config import CfgNode, get_cfg

from oanet_d2 import add_oanet_config

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "oanet_d2" / "config.py"
PAGE = ROOT / "docs" / "configuration.md"

INTRODUCTION = """\
# Configuration reference

<!-- Written by tools/config_reference.py from oanet_d2/config.py: edit that file, not this one. -->

The keys that `oanet_d2.add_oanet_config` adds to a Detectron2 config, or gives another default, with
these defaults. In a yaml they nest as Detectron2's do; on a command line they are written
`MODEL.OANET.ORDER srm_mean`. All other keys are in
[Detectron2's reference](https://detectron2.readthedocs.io/en/latest/modules/config.html).
"""

SECTION = re.compile(r"# -{8,} (.+)")
COMMENT = re.compile(r"# ?(.*)")
KEY = re.compile(r"cfg\.([A-Z][A-Z0-9_.]+) = ")
NODE = re.compile(r"cfg\.([A-Z][A-Z0-9_.]+) = CN\(\)")


@dataclass
class Entry:
    """What one comment says, of the keys that follow it."""

    section: str
    comment: List[str]
    keys: List[str] = field(default_factory=list)


def read_entries(source: str) -> List[Entry]:
    """
    Read the body of `add_oanet_config`. A comment is about the keys after it, up to the next one.

    Args:
        source: Python code.

    Raises:
        ValueError: a key has no comment.
    """
    entries: List[Entry] = []
    section, comment = "", []
    for line in map(str.strip, source.splitlines()):
        if found := SECTION.match(line):
            section, comment = found[1], []
        elif found := COMMENT.match(line):
            comment.append(found[1])
        elif found := KEY.match(line):
            if comment:
                entries.append(Entry(section, comment))
                comment = []
            if NODE.match(line):
                continue
            if not entries or entries[-1].section != section:
                raise ValueError(f"{found[1]} has no comment that says what it means.")
            entries[-1].keys.append(found[1])
    return entries


def own_keys(cfg: CfgNode, plain: CfgNode, prefix: str = "") -> List[str]:
    """
    Full names of the keys in `cfg` that are not in `plain` or have another value there. A node that
    is empty by default, for the user to fill, counts as a key.
    """
    keys = []
    for name, value in cfg.items():
        other = plain.get(name)
        if isinstance(value, CfgNode) and value:
            other = other if isinstance(other, CfgNode) else CfgNode()
            keys += own_keys(value, other, f"{prefix}{name}.")
        elif name not in plain or value != other:
            keys.append(prefix + name)
    return keys


def value_of(cfg: CfgNode, key: str):
    for name in key.split("."):
        cfg = cfg[name]
    return dict(cfg) if isinstance(cfg, CfgNode) else cfg


def as_markdown(comment: List[str]) -> List[str]:
    """
    A comment's lines: one that is indented and starts with a quotation mark is an item of a list,
    names in capitals and quotation marks stand for themselves.
    """
    lines = []
    for line in comment:
        line = re.sub(r":\w+:(`[^`]+`)", r"\1", line)  # Sphinx's roles
        text = line.lstrip()
        if text != line and text.startswith('"'):
            text = re.sub(r'^("\w+")', r"* `\1`", text)
        elif text != line:
            text = "  " + text
        elif lines and lines[-1].startswith(("*", "  ")):
            lines.append("")  # the end of a list
        lines.append(text)
    return lines


def page(source: str) -> str:
    """
    Returns:
        the whole page.

    Raises:
        ValueError: a key has no comment, or was not found in `source`.
    """
    cfg = get_cfg()
    plain = cfg.clone()
    add_oanet_config(cfg)
    entries = read_entries(source)
    written = {key for entry in entries for key in entry.keys}
    if missing := sorted(set(own_keys(cfg, plain)) - written):
        raise ValueError(f"{missing[0]} is not set in {SOURCE.name} in a way that is read here.")
    lines, section = [INTRODUCTION.rstrip()], None
    for entry in entries:
        if entry.section != section:
            section = entry.section
            lines += ["", f"## {section[0].upper()}{section[1:]}"]
        if entry.keys:
            defaults = [f"{key} = {value_of(cfg, key)!r}" for key in entry.keys]
            lines += ["", "```python", *defaults, "```"]
        lines += ["", *as_markdown(entry.comment)]
    return "\n".join(lines) + "\n"


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if it is stale")
    args = parser.parse_args(argv)
    text = page(SOURCE.read_text())
    if not args.check:
        PAGE.write_text(text)
    elif not PAGE.exists() or PAGE.read_text() != text:
        print(f"{PAGE} is stale; write it by: python tools/{Path(__file__).name}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

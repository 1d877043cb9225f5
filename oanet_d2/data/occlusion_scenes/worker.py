"""A worker process of `writer.py`: takes its job as JSON, prints one record per scene.

Run as a file, not with -m: that would import `oanet_d2` and with it torch and Detectron2, which
takes seconds and memory and is of no use here. So the package this file lies in is loaded on its own.
"""

import importlib.util
import json
import os
import signal
import sys
from pathlib import Path


def load_package(folder: Path):
    """Loads the package in `folder` without the packages it lies in; returns its module `writer`."""
    spec = importlib.util.spec_from_file_location(
        folder.name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None and spec.loader is not None  # it is for a .py
    package = importlib.util.module_from_spec(spec)
    sys.modules[folder.name] = package
    spec.loader.exec_module(package)
    return importlib.import_module(f"{folder.name}.writer")


def main() -> None:
    # Ctrl-C reaches the whole process group; the parent ends its workers itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    job = json.loads(sys.argv[1])
    # As in the parent, and without this file's own folder, whose modules have common names.
    sys.path[:] = job["sys_path"]
    writer = load_package(Path(__file__).resolve().parent)
    # The workers are as many as there are CPUs; threads inside each would only be in their way.
    writer.cv2.setNumThreads(1)
    try:
        writer.work(job)
    except BrokenPipeError:
        # The parent is gone. os._exit, because a plain exit would try to flush stdout once more.
        os._exit(1)


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Make .venv hold exactly what requirements/ pins, Detectron2 and this project.

    python3 tools/setup_env.py [--venv DIR | none] [--detectron2 CHECKOUT | git+URL] [--verify]

`make setup`, `make test` and `make demo` call it; it needs nothing but Python. A .venv that is
whole costs a tenth of a second; one that is missing, unfinished, broken or made for other pins is
built from scratch. What tells is the stamp, a file in .venv that says "unfinished" until everything
is in and has been imported, so an interrupted set-up never passes for a whole one.
"""

import argparse
import contextlib
import ctypes
import hashlib
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from urllib.parse import urlsplit, urlunsplit

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
LOCK = os.path.join(ROOT, "requirements", "lock.txt")
WHEEL = os.path.join(ROOT, "requirements", "detectron2.txt")

PYTHONS = ((3, 10), (3, 12))  # torch 2.14.1 needs 3.10; numpy 1.26.4 has no wheels after 3.12
PLATFORMS = (("Linux", "x86_64"), ("Linux", "aarch64"), ("Darwin", "arm64"))
# Gigabytes: (downloaded, installed). On Linux, torch brings its CUDA libraries.
SIZE = {"Linux": (3.3, 6.5), "Darwin": (0.5, 2.0)}
MODULES = """
    torch torchvision numpy scipy cv2 PIL pycocotools fvcore iopath panopticapi detectron2
""".split()
PROJECT = "oanet_d2"
PINNED = "the pinned wheel"
STAMP = "setup_env.json"
UNFINISHED = {"unfinished": True}


class SetupError(Exception):
    """A message for the user: what was found, and what would be right."""


def say(text):
    print("set-up: " + text, flush=True)


# ---------------------------------------------------------------- what can be told before starting


def check_python(version, executable):
    low, high = PYTHONS
    if low <= tuple(version[:2]) <= high:
        return
    if tuple(version[:2]) < low:
        why = "too old: torch 2.14.1 needs Python 3.10"
    else:
        why = "too new: numpy 1.26.4, which Detectron2 needs, has no wheels after Python 3.12"
    names = ["python3.%d" % minor for minor in range(high[1], low[1] - 1, -1)]
    here = [name for name in names if starts(name)]
    raise SetupError(
        "%s is Python %s, %s.\n" % (executable, ".".join(map(str, version[:3])), why)
        + "Right: Python 3.10 to 3.12, "
        + ("for example `make PYTHON=%s ...`, which is on this machine." % here[0] if here else
           "which was not found on this machine; install one and say `make PYTHON=python3.11 ...`.")
        + "\nOr use an environment of your own that has Detectron2: `make VENV=none ...`."
    )


def starts(python):
    """Does this interpreter run at all?"""
    quiet = subprocess.DEVNULL
    try:
        return subprocess.call([python, "-I", "-c", ""], stdout=quiet, stderr=quiet) == 0
    except OSError:
        return False


def check_machine(system, machine):
    if (system, machine) not in PLATFORMS:
        raise SetupError(
            "this is %s on %s, for which torch 2.14.1 has no wheels.\n" % (system, machine)
            + "Right: " + ", ".join("%s on %s" % known for known in PLATFORMS)
            + " (Windows: inside WSL).\n"
            + "Or use an environment of your own that has Detectron2: `make VENV=none ...`."
        )
    if importlib.util.find_spec("ensurepip") is None:
        raise SetupError(
            "%s has no module ensurepip, so it cannot make a virtual environment with pip.\n"
            % sys.executable
            + "Right on Debian and Ubuntu: apt-get install python3.%d-venv" % sys.version_info[1]
        )
    if system == "Linux":
        for library, package in (("libGL.so.1", "libgl1"), ("libgthread-2.0.so.0", "libglib2.0-0")):
            try:
                ctypes.CDLL(library)
            except OSError as error:
                raise SetupError(
                    "opencv-python needs %s, which does not load: %s\n" % (library, error)
                    + "Right on Debian and Ubuntu: apt-get install %s" % package
                ) from error


def check_space(venv, system):
    """Room for the environment beside the downloads, which pip unpacks in the temporary folder."""
    download, installed = SIZE[system]
    needs = {}  # device -> [gigabytes needed, a folder on it]
    for folder, size in ((os.path.dirname(venv), installed), (tempfile.gettempdir(), download)):
        needs.setdefault(os.stat(folder).st_dev, [0, folder])[0] += size
    for size, folder in needs.values():
        free = shutil.disk_usage(folder).free / 1e9
        if free < size:
            raise SetupError(
                "%s has %.1f GB free; the set-up needs %.1f GB there.\n" % (folder, free, size)
                + "Right: make room, or name other places with VENV=DIR (%.1f GB) and the "
                "environment variable TMPDIR (%.1f GB)." % (installed, download)
            )


def check_ours(venv):
    """Only a folder with our stamp is ever emptied."""
    if os.path.isdir(venv) and os.listdir(venv) and read_stamp(venv) is None:
        raise SetupError(
            "%s holds something that this set-up did not make, so it is left alone.\n" % venv
            + "Right: remove or rename it; or name another place with VENV=DIR; or, if it is an "
            "environment of your own, use it as it is: activate it and say `make VENV=none ...`."
        )


def check_detectron2(choice):
    """Can the DETECTRON2 that the user chose be built here?"""
    needed = ["c++"]
    if choice.startswith("git+"):
        needed.append("git")
    elif not os.path.isfile(os.path.join(choice, "detectron2", "__init__.py")):
        raise SetupError(
            "DETECTRON2=%s is neither a Detectron2 checkout (a folder with detectron2/__init__.py) "
            "nor a git address.\n" % choice
            + "Right: DETECTRON2=../detectron2, or DETECTRON2=git+https://HOST/PATH.git@COMMIT, "
            "or nothing for the pinned wheel."
        )
    for tool in needed:
        if not shutil.which(tool):
            raise SetupError(
                "DETECTRON2=%s is built from source, which needs `%s`; it is not on PATH.\n"
                % (choice, tool)
                + "Right on Debian and Ubuntu: apt-get install g++ git python3-dev"
            )
    if choice.startswith("git+"):
        parts = urlsplit(choice[len("git+"):])
        address = urlunsplit(parts[:2] + (parts.path.rsplit("@", 1)[0], "", ""))
        if run(["git", "ls-remote", "--exit-code", address, "HEAD"], stdout=subprocess.DEVNULL):
            raise SetupError(
                "DETECTRON2=%s: git cannot read %s (see above).\n" % (choice, address)
                + "Right: an address that git reaches from here, a local checkout, or nothing for "
                "the pinned wheel."
            )


# ---------------------------------------------------------------- is there a whole one already?


def wanted_stamp(detectron2, version=sys.version_info):
    """Everything that makes an environment another environment."""
    pins = hashlib.sha256()
    for path in (LOCK, WHEEL):
        with open(path, "rb") as file:
            pins.update(file.read())
    return {
        "set of pins (hash)": pins.hexdigest()[:12],
        "DETECTRON2": detectron2 or PINNED,
        "Python": "%d.%d" % tuple(version[:2]),
        "project folder": ROOT,
    }


def read_stamp(venv):
    try:
        with open(os.path.join(venv, STAMP)) as file:
            return json.load(file)
    except (OSError, ValueError):
        return None


def write_stamp(venv, stamp):
    path = os.path.join(venv, STAMP)
    with open(path + ".new", "w") as file:
        json.dump(stamp, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(path + ".new", path)


def what_is_wrong(venv, wanted, verify=False):
    """Why this environment cannot be used as it is; None when it can.

    Without `verify` the modules are only looked for (0.1 s), with it they are imported (seconds).
    """
    stamp = read_stamp(venv)
    if stamp is None:
        return "is not there"
    if stamp == UNFINISHED:
        return "was not finished"
    for name in wanted:
        if stamp.get(name) != wanted[name]:
            return "was made for another %s: %s, now %s" % (name, stamp.get(name), wanted[name])
    if not starts(python_of(venv)):
        return "is broken: %s does not start" % python_of(venv)
    return import_problem(venv, verify, wanted)


def import_problem(venv, verify, wanted):
    modules = MODULES + ["detectron2._C"] * (verify and wanted["DETECTRON2"] != PINNED)
    # The project itself is only looked for: a mistake in its code is no fault of the environment.
    code = """if True:
        import importlib.util, sys
        verify, project, *modules = sys.argv[1:]
        for name in modules:
            if verify == "True":
                __import__(name)
            elif not importlib.util.find_spec(name):
                sys.exit("No module named " + name)
        if not importlib.util.find_spec(project):
            sys.exit("No module named " + project)
    """
    # -I: only what the environment itself holds counts, not PYTHONPATH or the current folder
    done = subprocess.run(
        [python_of(venv), "-I", "-c", code, str(verify), PROJECT] + modules,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, universal_newlines=True,
    )
    if done.returncode == 0:
        return None
    last = (done.stderr.strip().splitlines() or ["exit status %d" % done.returncode])[-1]
    return "is broken: " + last


def python_of(venv):
    return os.path.join(venv, "bin", "python")


# ---------------------------------------------------------------- building it


def build(venv, wanted, detectron2, held):
    """From nothing to a whole environment. `held` is the lock's file descriptor."""
    clear(venv)
    steps = 5
    python = python_of(venv)
    pip = [python, "-m", "pip", "--no-input", "--disable-pip-version-check"]
    install = pip + ["install", "--no-warn-script-location"]

    say("step 1 of %d: a virtual environment in %s" % (steps, venv))
    if run([base_python(), "-m", "venv", venv], held):
        raise SetupError("`%s -m venv` failed (see above)." % base_python())

    # The two smallest pieces first: they tell whether there is a package index at all, and the
    # others are built with them.
    say("step 2 of %d: pip and setuptools" % steps)
    first = os.path.join(venv, "first.txt")
    with open(LOCK) as file, open(first, "w") as out:
        out.writelines(block for name, block in requirements(file.read())
                       if name in ("pip", "setuptools"))
    quick = ["--quiet", "--timeout", "15", "--retries", "1", "--require-hashes", "-r", first]
    if run(install + quick, held):
        raise SetupError(
            "pip could not download pip and setuptools (see above), so nothing larger was tried.\n"
            "Right: a network, and a package index that pip reaches. `python3 -m pip config list` "
            "shows pip's own settings; PIP_INDEX_URL, HTTPS_PROXY and PIP_CERT change them."
        )

    say("step 3 of %d: torch and everything else that requirements/lock.txt pins" % steps)
    # No build isolation: what is built (fvcore, antlr4) is built with the pinned setuptools.
    pinned = ["--require-hashes", "--no-build-isolation"]
    must(venv, run(install + pinned + ["-r", LOCK], held))

    say("step 4 of %d: Detectron2 (%s)" % (steps, wanted["DETECTRON2"]))
    if detectron2:
        say("compiling it takes a few minutes and prints nothing meanwhile")
        must(venv, run(install + ["--no-deps", "--no-build-isolation", detectron2], held))
    else:
        site = output([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"])
        # The wheel holds only Python files, but its tag says CPython 3.10; pip takes it for another
        # Python only into a folder named to it.
        tag = "--python-version 3.10 --implementation cp --abi none --platform any".split()
        wheel = ["--no-deps", "--only-binary=:all:", "--require-hashes", "-r", WHEEL]
        must(venv, run(install + wheel + tag + ["--target", site], held))
        # Its developers' scripts, which the wheel drops beside detectron2 as a package `tools`.
        shutil.rmtree(os.path.join(site, "tools"))

    say("step 5 of %d: this project, and importing the rest once" % steps)
    must(venv, run(
        install + ["--quiet", "--no-deps", "--no-build-isolation", "--editable", ROOT], held
    ))
    problem = import_problem(venv, True, wanted)
    if problem:
        raise SetupError("everything was installed, but %s %s" % (venv, problem))
    write_stamp(venv, wanted)
    say("done: %s is whole" % venv)


def base_python():
    """The interpreter outside any environment: `python3` of an activated .venv goes with it."""
    if sys.prefix == sys.base_prefix:
        return sys.executable
    return os.path.join(sys.base_prefix, "bin", "python%d.%d" % sys.version_info[:2])


def clear(venv):
    """Empty the folder, all but its stamp, which now says that it is unfinished and ours."""
    check_ours(venv)
    os.makedirs(venv, exist_ok=True)
    write_stamp(venv, UNFINISHED)
    for name in os.listdir(venv):
        path = os.path.join(venv, name)
        if os.path.isdir(path) and not os.path.islink(path):
            shutil.rmtree(path)
        elif name != STAMP:
            os.remove(path)


def requirements(text):
    """(name, text) of each requirement in a requirements file, hashes and markers included."""
    for block in re.findall(r"^[A-Za-z0-9].*(?:\n[ \t]+.*)*\n", text, re.MULTILINE):
        yield re.match(r"[A-Za-z0-9._-]+", block).group().lower(), block


def must(venv, failed):
    if not failed:
        return
    for folder in (venv, tempfile.gettempdir()):
        free = shutil.disk_usage(folder).free
        if free < 2e8:
            raise SetupError("the disk is full: %s has %.2f GB free." % (folder, free / 1e9))
    raise SetupError(
        "the last step failed; the reason is above. %s stays marked unfinished, and the next run "
        "starts over with what pip has in its cache." % venv
    )


def run(command, held=None, **options):
    """Its exit status. Output goes to the terminal; nothing can stop to ask a question."""
    environment = dict(os.environ, GIT_TERMINAL_PROMPT="0")
    environment["PYTHONWARNINGS"] = "ignore"  # setuptools warns that an editable install is one
    environment.setdefault("MAX_JOBS", str(min(4, os.cpu_count() or 1)))  # each compiler takes 1 GB
    for name in ("PYTHONPATH", "PYTHONHOME", "PIP_USER", "PIP_TARGET", "PIP_PREFIX"):
        environment.pop(name, None)  # they would put packages elsewhere
    # A child keeps the lock even if this process is killed, so no second set-up starts beside it.
    return subprocess.call(
        command, env=environment, stdin=subprocess.DEVNULL,
        pass_fds=() if held is None else (held,), **options
    )


def output(command):
    return subprocess.check_output(command, universal_newlines=True).strip()


@contextlib.contextmanager
def only_one(venv):
    """Held by one set-up at a time; a second one waits here."""
    import fcntl  # not on Windows, which check_machine has refused by now

    os.makedirs(os.path.dirname(venv), exist_ok=True)
    with open(venv + ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            say("another set-up of %s is at work; waiting for it to end" % venv)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file.fileno()


# ---------------------------------------------------------------- the whole


def check_own_environment():
    """VENV=none: nothing is made; say at once what the user's own environment lacks."""
    sys.path.insert(0, ROOT)  # where `python train_net.py` finds oanet_d2
    missing = [name for name in MODULES + [PROJECT] if importlib.util.find_spec(name) is None]
    if missing:
        raise SetupError(
            "VENV=none, and %s lacks: %s.\n" % (sys.executable, ", ".join(missing))
            + "Right: `%s -m pip install -e '.[test]'` brings all but Detectron2; Detectron2 is "
            "yours to install.\nOr leave VENV=none out: an environment is then made in .venv."
            % sys.executable
        )


def main(arguments):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--venv", default=os.path.join(ROOT, ".venv"),
                        help="where; `none` only checks the Python that runs this")
    parser.add_argument("--detectron2", default="",
                        help="a Detectron2 checkout or git+URL to build instead of the wheel")
    parser.add_argument("--verify", action="store_true",
                        help="import the modules of an environment that looks whole")
    options = parser.parse_args(arguments)
    if options.venv == "none":
        return check_own_environment()

    check_python(sys.version_info, sys.executable)
    venv = os.path.abspath(options.venv)
    detectron2 = options.detectron2
    if os.path.isdir(detectron2):
        detectron2 = os.path.abspath(detectron2)
    wanted = wanted_stamp(detectron2)
    if not what_is_wrong(venv, wanted, options.verify):
        return
    system = platform.system()
    check_machine(system, platform.machine())
    with only_one(venv) as held:
        problem = what_is_wrong(venv, wanted, options.verify)
        if not problem:  # the set-up that we waited for has done it
            return
        check_ours(venv)
        check_space(venv, system)
        if detectron2:
            check_detectron2(detectron2)
        say("%s %s; making it with %s (Python %s)"
            % (venv, problem, base_python(), platform.python_version()))
        say("up to %.1f GB are downloaded, less what pip has in its cache; %.1f GB are installed"
            % SIZE[system])
        build(venv, wanted, detectron2, held)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except SetupError as error:
        sys.exit("set-up: error: " + str(error).replace("\n", "\n    "))
    except KeyboardInterrupt:
        sys.exit("\nset-up: interrupted; what is unfinished is made anew by the next run")

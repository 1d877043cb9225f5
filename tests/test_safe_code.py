"""
No code of this project runs what is in a file, or makes temporary files that others can guess.
"""

import ast
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

SOURCES = sorted(
    path
    for folder in ("oanet_d2", "tools", "demo", ".")
    for path in (REPOSITORY / folder).glob("*.py" if folder == "." else "**/*.py")
)
# What runs code, unpickles, or makes a name first and the file later.
BANNED = {
    *("eval", "exec", "os.system", "os.popen", "tempfile.mktemp", "np.memmap"),
    *("pickle.load", "pickle.loads", "pickle.Unpickler", "dill.load", "joblib.load", "shelve.open"),
    *("yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load", "yaml.UnsafeLoader"),
    *("yaml.Loader", "yaml.FullLoader", "torch.jit.load", "pandas.read_pickle", "marshal.loads"),
}
SHARED_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm")


def dotted(node):
    """`a.b.c` of an expression; None of any other."""
    if isinstance(node, ast.Attribute):
        base = dotted(node.value)
        return base and f"{base}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else None


def faults(code):
    """What a source must not have, as (line, what)."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Constant) and str(node.value).startswith(SHARED_FOLDERS):
            yield node.lineno, node.value
        if not isinstance(node, ast.Call):
            continue
        name, keywords = dotted(node.func), {k.arg: k.value for k in node.keywords}
        if name in BANNED:
            yield node.lineno, name
        elif name == "torch.load" and "weights_only" not in keywords:
            yield node.lineno, "torch.load without weights_only"
        elif name in ("np.load", "numpy.load") and "allow_pickle" in keywords:
            yield node.lineno, "np.load with allow_pickle"
        elif name and name.startswith("subprocess.") and "shell" in keywords:
            yield node.lineno, "a shell"
        elif isinstance(node.func, ast.Attribute) and node.func.attr == "merge_from_file":
            safe = keywords.get("allow_unsafe")
            if not (isinstance(safe, ast.Constant) and safe.value is False):
                yield node.lineno, "merge_from_file without allow_unsafe=False"
        elif name and name.split(".")[-1] == "DetectionCheckpointer":
            yield node.lineno, "DetectionCheckpointer unpickles; use OANetCheckpointer"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(REPOSITORY)))
def test_source(path):
    assert list(faults(path.read_text())) == []


def test_all_of_the_project_is_looked_at():
    names = {str(path.relative_to(REPOSITORY)) for path in SOURCES}
    assert {"train_net.py", "oanet_d2/checkpoint.py", "tools/ranking_ablation.py"} <= names
    assert len(SOURCES) > 40


@pytest.mark.parametrize(
    "code",
    [
        "eval('1')",
        "pickle.loads(x)",
        "torch.load(path)",
        "yaml.load(f, yaml.SafeLoader)",
        "cfg.merge_from_file(path)",
        "cfg.merge_from_file(path, allow_unsafe=True)",
        "open('/tmp/x')",
        "tempfile.mktemp()",
        "DetectionCheckpointer(model)",
        "np.load(p, allow_pickle=True)",
        "subprocess.run(x, shell=True)",
    ],
)
def test_faults_are_found(code):
    assert len(list(faults(code))) == 1


def test_only_tensors_come_out_of_torch_load():
    """`weights_only` is True wherever the user does not say otherwise."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and dotted(node.func) == "torch.load":
                (value,) = (k.value for k in node.keywords if k.arg == "weights_only")
                is_true = isinstance(value, ast.Constant) and value.value is True
                assert is_true or Path(path).name == "checkpoint.py", f"{path}:{node.lineno}"

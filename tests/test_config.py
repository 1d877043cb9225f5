import re

import pytest
import yaml

from detectron2.config import CfgNode, get_cfg

from oanet_d2 import add_oanet_config, complete_config, load_config
from tests.conftest import CONFIGS

CODE = [
    "!!python/object/apply:os.system ['touch {}']",
    "!!python/object/new:subprocess.Popen [['touch', '{}']]",
    "!!python/object/apply:eval ['open(\"{}\", \"w\")']",
    "!!python/name:os.system",
]


@pytest.fixture
def config(tmp_path):
    """Writes a config; its path."""

    def write(text, name="config.yaml"):
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return write


@pytest.mark.parametrize("path", sorted(x.relative_to(CONFIGS) for x in CONFIGS.rglob("*.yaml")))
def test_as_detectron2_loads_it(path):
    expected = get_cfg()
    add_oanet_config(expected)
    expected.merge_from_file(str(CONFIGS / path))
    expected.merge_from_list(["SEED", "7", "INPUT.MIN_SIZE_TEST", 99])
    for file in (CONFIGS / path, str(CONFIGS / path)):
        assert load_config(file, ["SEED", "7", "INPUT.MIN_SIZE_TEST", 99]) == expected


def keys(node, prefix=""):
    """The full names of a config's values. A section that is open to new keys counts as one."""
    for name, value in node.items():
        if isinstance(value, CfgNode) and not value.is_new_allowed():
            yield from keys(value, f"{prefix}{name}.")
        else:
            yield prefix + name


def test_few_keys_beyond_detectron2s():
    cfg = get_cfg()
    theirs = set(keys(cfg))
    add_oanet_config(cfg)
    ours = set(keys(cfg))
    assert theirs <= ours and len(ours - theirs) <= 30


@pytest.mark.parametrize("code", CODE)
@pytest.mark.parametrize("place", ["VERSION: {}", "MODEL: {{WEIGHTS: {} }}", "{}"])
def test_code_in_a_config_is_refused_and_does_not_run(config, tmp_path, code, place):
    touched = tmp_path / "touched"
    text = place.format(code.format(touched))
    for path in (config(text), config(f"_BASE_: {config(text, 'base.yaml').name}")):
        with pytest.raises(ValueError, match="(?s)config.yaml: .*python/"):
            load_config(path)
    assert not touched.exists()


def test_detectron2_alone_would_run_it(config, tmp_path):
    """Otherwise the test above would prove nothing."""
    get_cfg().merge_from_file(str(config("SEED: " + CODE[0].format(tmp_path / "touched"))))
    assert (tmp_path / "touched").exists()


@pytest.mark.parametrize(
    "text, words",
    [
        ("MODEL: [", "config.yaml: while parsing"),
        ("[1, 2]", "config.yaml: "),
        ("", "config.yaml: "),
        ("_BASE_: none.yaml", "none.yaml"),
        ("_BASE_: config.yaml", "config.yaml: "),
        ("MODEL: {NO_KEY: 1}", "config.yaml: Non-existent config key: MODEL.NO_KEY"),
        ("{VERSION: 2, SEED: soon}", "config.yaml: Type mismatch"),
        ("{VERSION: 2, MODEL: 5}", "config.yaml: Type mismatch"),
        ("VERSION: 99", "config.yaml: "),
        ("MODEL: {SRM_HEAD: {TRAIN_MASKS: [gt]}}", "MODEL.SRM_HEAD.TRAIN_MASKS"),
    ],
)
def test_bad_files(config, text, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        load_config(config(text))


@pytest.mark.parametrize("path", ["", "none.yaml", "."])
def test_missing_files(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=re.escape(f"config {path}: ")):
        load_config(path)


@pytest.mark.parametrize(
    "opts, words",
    [
        (["SEED"], "'SEED' has no value"),
        (["NO_KEY", "1"], "override NO_KEY '1': Non-existent key: NO_KEY"),
        (["SEED", "soon"], "override SEED 'soon': Type mismatch"),
        (["SEED", "1", "MODEL", "{}"], "override MODEL '{}': "),
        ([5, 6], "override 5 6: "),
    ],
)
def test_bad_overrides(opts, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        load_config(CONFIGS / "Base-OANet.yaml", opts)


def test_what_detectron2_dumps_loads_again(config):
    cfg = load_config(CONFIGS / "OcclusionScenes/oanet_R_18.yaml")
    assert "&id" in cfg.dump()  # there are aliases
    again = load_config(config(cfg.dump()))
    assert yaml.safe_load(again.dump()) == yaml.safe_load(cfg.dump())


def test_proposals_are_not_unpickled():
    cfg = load_config(CONFIGS / "OcclusionScenes/oanet_R_18.yaml", ["MODEL.LOAD_PROPOSALS", "True"])
    with pytest.raises(ValueError, match="LOAD_PROPOSALS is True: Detectron2 unpickles"):
        complete_config(cfg)
    cfg.MODEL.ALLOW_PICKLE = True
    complete_config(cfg)

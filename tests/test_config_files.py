import os
import re

import pytest
import yaml

from detectron2.config import get_cfg

from oanet_d2 import add_oanet_config, complete_config, load_config
from tests.conftest import CONFIGS

BAD_TAGS = [
    "!!python/object/apply:os.system ['touch {}']",
    "!!python/object/new:subprocess.Popen [['touch', '{}']]",
    "!!python/object/apply:eval ['open(\"{}\", \"w\")']",
    "!!python/name:os.system",
    "!!python/module:os",
]


@pytest.fixture
def config(tmp_path):
    """Writes a config; its path."""

    def write(text, name="config.yaml"):
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(tmp_path / name)

    return write


@pytest.mark.parametrize("path", sorted(x.relative_to(CONFIGS) for x in CONFIGS.rglob("*.yaml")))
def test_as_detectron2_loads_it(path):
    expected = get_cfg()
    add_oanet_config(expected)
    expected.merge_from_file(str(CONFIGS / path))
    expected.merge_from_list(["SEED", "7", "INPUT.MIN_SIZE_TEST", 99])
    assert load_config(CONFIGS / path, ["SEED", "7", "INPUT.MIN_SIZE_TEST", 99]) == expected


@pytest.mark.parametrize("tag", BAD_TAGS)
@pytest.mark.parametrize("place", ["VERSION: {}", "_BASE_: {}", "MODEL: {{WEIGHTS: {} }}", "{}"])
def test_a_config_runs_nothing(config, tmp_path, tag, place):
    touched = tmp_path / "touched"
    path = config(place.format(tag.format(touched)))
    with pytest.raises(ValueError, match="(?s)config.yaml: .*python.*nothing in it is run"):
        load_config(path)
    with pytest.raises(ValueError, match="base.yaml: .*python"):
        config(place.format(tag.format(touched)), "base.yaml")
        load_config(config("_BASE_: base.yaml"))
    assert not touched.exists()


def test_detectron2_alone_would_run_it(config, tmp_path):
    """Otherwise the test above would prove nothing."""
    cfg = get_cfg()
    path = config("SEED: " + BAD_TAGS[0].format(tmp_path / "touched"))
    cfg.merge_from_file(path)
    assert (tmp_path / "touched").exists()


LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 10)}]\n" for a, b in zip("abcdefgh", "bcdefghi")
)


@pytest.mark.parametrize(
    "text, words",
    [
        ("", "holds None; it must hold keys and their values"),
        ("[1, 2]", "holds [1, 2]; it must hold keys"),
        ("MODEL: [", "is no yaml"),
        (b"\xff\xfe\x00", "is no yaml"),
        ("a: 2001-99-99", "is no yaml: month must be in 1..12"),
        ("MODEL: " + "[" * 5000, "nested too deeply"),
        (LAUGHS, "more than 100,000 values, each alias written out"),
        ("a: &a [*a]", "an alias stands for what it lies in"),
        ("SEED: 1\n" + "#" * 2**18, "a config may have 262,144 bytes"),
        ("_BASE_: config.yaml", "inherits from more than 32 files"),
        ("_BASE_: [config.yaml, config.yaml]", "inherits from more than 32 files"),
        ("_BASE_: none.yaml", "none.yaml' is not there, or is not a file"),
        ("_BASE_: pipe", "pipe' is not there, or is not a file"),
        ("_BASE_: 5", "_BASE_ is 5; it must be a path"),
        ("MODEL: {NO_KEY: 1}", "Non-existent config key: MODEL.NO_KEY"),
        ("SEED: {a: 1}", "config.yaml: "),
        ("SEED: soon", "Type mismatch"),
        ("MODEL: 5", "config.yaml: no config for Detectron2 (TypeError"),
        ("{VERSION: 2, MODEL: 5}", "Type mismatch"),
        ("{1: 2}", "config.yaml: "),
        ("VERSION: 99", "v99 config into a v2 config"),
    ],
)
def test_bad_files(config, tmp_path, text, words):
    os.mkfifo(tmp_path / "pipe")  # to open it would wait forever
    with pytest.raises(ValueError, match=re.escape(words)):
        load_config(config(text))


@pytest.mark.parametrize("path", ["", "none.yaml", ".", "a\0b"])
def test_missing_files(path):
    with pytest.raises(ValueError, match="is not there, or is not a file"):
        load_config(path)


def test_aliases_within_bounds(config):
    path = config("INPUT: {MIN_SIZE_TRAIN: &s [64, 96], FORMAT: BGR}\nDATASETS: {TEST: *s}")
    assert load_config(path).DATASETS.TEST == (64, 96)


@pytest.mark.parametrize(
    "opts, words",
    [
        (["SEED"], "overrides are KEY VALUE in turn; 'SEED' has no value"),
        (["NO_KEY", "1"], "override NO_KEY '1': Non-existent key: NO_KEY"),
        (["SEED", "soon"], "override SEED 'soon': Type mismatch"),
        (["MODEL", "{}"], "override MODEL '{}': Type mismatch"),
        (["_BASE_", "x.yaml"], "override _BASE_"),
        (["SEED", "-" * 10**5 + "1"], "override SEED '-----"),
        (["MODEL", {}], "override MODEL {}: a section cannot be replaced"),
        ([5, 6], "override 5 6: "),
    ],
)
def test_bad_overrides(opts, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        load_config(CONFIGS / "Base-OANet.yaml", opts)


def test_what_detectron2_dumps_can_be_loaded(config):
    cfg = load_config(CONFIGS / "OcclusionScenes/oanet_R_18.yaml")
    assert cfg.dump().count("&id")  # the case that there are aliases
    again = load_config(config(cfg.dump()))
    assert yaml.safe_load(again.dump()) == yaml.safe_load(cfg.dump())


def test_proposals_are_not_unpickled():
    cfg = load_config(CONFIGS / "OcclusionScenes/oanet_R_18.yaml", ["MODEL.LOAD_PROPOSALS", "True"])
    with pytest.raises(ValueError, match="LOAD_PROPOSALS is True: Detectron2 unpickles"):
        complete_config(cfg)
    cfg.MODEL.ALLOW_PICKLE = True
    complete_config(cfg)

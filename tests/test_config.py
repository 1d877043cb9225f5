from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
import yaml

from detectron2.config import get_cfg
from detectron2.projects.point_rend import add_pointrend_config

from oanet_d2 import add_oanet_config, load_config
from tests.conftest import CONFIGS

CODE = "!!python/object/apply:os.system ['touch {}']"


def write(folder, text, name="config.yaml"):
    (folder / name).write_text(text)
    return folder / name


@pytest.mark.parametrize("path", sorted(x.relative_to(CONFIGS) for x in CONFIGS.rglob("*.yaml")))
def test_as_detectron2_loads_it(path):
    expected = get_cfg()
    add_oanet_config(expected)
    expected.merge_from_file(str(CONFIGS / path))
    expected.merge_from_list(["SEED", "7", "INPUT.MIN_SIZE_TEST", 99])
    assert load_config(CONFIGS / path, ["SEED", "7", "INPUT.MIN_SIZE_TEST", 99]) == expected


def test_a_config_of_the_package_is_found_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = "OcclusionScenes/oanet_lite0.yaml"
    expected = load_config(CONFIGS / name)
    assert load_config(name) == expected
    # As the base of a yaml and of its base, too. A file that is there comes first.
    write(tmp_path, f"_BASE_: {name}\nSOLVER:\n  MAX_ITER: 7\n", "mine.yaml")
    mine = write(tmp_path, "_BASE_: mine.yaml\nSEED: 6")
    expected.SOLVER.MAX_ITER, expected.SEED = 7, 6
    assert load_config(mine) == load_config("config.yaml") == expected
    (tmp_path / "OcclusionScenes").mkdir()
    write(tmp_path, "SEED: 5", name)
    assert load_config(name).SEED == load_config("mine.yaml").SEED == 5
    with pytest.raises(ValueError, match=r"oanet_lite1\.yaml"):
        load_config("OcclusionScenes/oanet_lite1.yaml")
    with pytest.raises(ValueError, match=r"oanet_lite1\.yaml"):
        load_config(write(tmp_path, "_BASE_: OcclusionScenes/oanet_lite1.yaml"))


def test_a_base_is_merged_as_detectron2_merges_it(tmp_path, monkeypatch):
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    text = "DATASETS:\n  PANOPTIC:\n    mine: {%s}\n"
    write(tmp_path, text % "IMAGE_ROOT: a, PANOPTIC_JSON: b", "base.yaml")
    handler = partial(SimpleHTTPRequestHandler, directory=tmp_path)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        for base in ("base.yaml", f"http://127.0.0.1:{server.server_port}/base.yaml"):
            rest = text % "IMAGE_ROOT: c, INSTANCES_JSON: d"
            mine = load_config(write(tmp_path, f"_BASE_: {base}\n{rest}"))
            expected = {"IMAGE_ROOT": "c", "PANOPTIC_JSON": "b", "INSTANCES_JSON": "d"}
            assert {"mine": expected} == mine.DATASETS.PANOPTIC
        server.shutdown()


def keys(tree, prefix=""):
    for name, value in tree.items():
        yield from keys(value, f"{prefix}{name}.") if isinstance(value, dict) else [prefix + name]


def test_few_keys_beyond_detectron2s():
    ours, theirs = get_cfg(), get_cfg()
    add_oanet_config(ours)
    add_pointrend_config(theirs)
    assert len({*keys(ours)} - {*keys(theirs)}) <= 30


def test_code_in_a_config_is_refused_and_does_not_run(tmp_path):
    touched = tmp_path / "touched"
    text = "SEED: " + CODE.format(touched)
    write(tmp_path, text, "base.yaml")
    for path in (write(tmp_path, text), write(tmp_path, "_BASE_: base.yaml")):
        with pytest.raises(ValueError, match="(?s)config.yaml: .*python/"):
            load_config(path)
    assert not touched.exists()
    get_cfg().merge_from_file(str(tmp_path / "base.yaml"))  # Detectron2 alone
    assert touched.exists()


@pytest.mark.parametrize(
    "text, words",
    [
        ("MODEL: [", "config.yaml: while parsing"),
        ("[1, 2]", "config.yaml: "),
        ("_BASE_: none.yaml", "none.yaml"),
        ("MODEL: {NO_KEY: 1}", "config.yaml: Non-existent config key: MODEL.NO_KEY"),
        ("{VERSION: 2, SEED: soon}", "config.yaml: Type mismatch"),
    ],
)
def test_bad_files(tmp_path, text, words):
    with pytest.raises(ValueError, match=words):
        load_config(write(tmp_path, text))


@pytest.mark.parametrize(
    "opts, words",
    [
        (["SEED"], "'SEED' has no value"),
        (["NO_KEY", "1"], "override NO_KEY '1': Non-existent key: NO_KEY"),
        (["SEED", "soon"], "override SEED 'soon': Type mismatch"),
    ],
)
def test_bad_overrides(opts, words):
    with pytest.raises(ValueError, match=words):
        load_config(CONFIGS / "Base-OANet.yaml", opts)


def test_what_detectron2_dumps_loads_again(tmp_path):
    cfg = load_config(CONFIGS / "OcclusionScenes/oanet_R_18.yaml")
    assert "&id" in cfg.dump()  # there are aliases
    again = load_config(write(tmp_path, cfg.dump()))
    assert yaml.safe_load(again.dump()) == yaml.safe_load(cfg.dump())

import json

import pytest
import results
from PIL import Image

PQ_TH = {"score": (40, 50), "srm_pairs": (50, 66), "oracle": (60, 70)}  # of two seeds
CONFIG = """
SEED: 1
SOLVER: {MAX_ITER: 5}
MODEL: {OANET: {ORDER: srm_pairs}}
DATASETS: {TEST: [occlusion_scenes_val]}
"""


def test_tables_and_pictures(tmp_path, monkeypatch):
    runs, pictures = [tmp_path / "0", tmp_path / "1"], tmp_path / "docs" / "pictures"
    for i, run in enumerate(runs):  # as far as the script reads them
        for name in ("pictures", "pictures_still_wrong"):
            (run / name).mkdir(parents=True)
            for k in range(3):
                Image.new("RGB", (8, 8), (60 * k, 0, 0)).save(run / name / f"{k:03}_{90 - k}.png")
        orders = {x: dict.fromkeys(results.COLUMNS, values[i]) for x, values in PQ_TH.items()}
        (run / "orderings.json").write_text(json.dumps({"orderings": orders, "images": 7}))
        (run / "config.yaml").write_text(CONFIG)
    pictures.mkdir(parents=True)
    pages = [tmp_path / "README.md", tmp_path / "docs" / "RESULTS.md"]
    for page, name in zip(pages, ("", " (occlusion_scenes)")):
        page.write_text(f"before\n<!-- tools/results.py{name} fills this in -->old<!-- end -->\nafter\n")
    monkeypatch.setattr("sys.argv", ["results.py", "--root", *map(str, [tmp_path, *runs])])
    results.main()
    for page in pages:
        text = page.read_text()
        assert text.startswith("before\n<!--") and text.endswith("<!-- end -->\nafter\n")
        row = next(x for x in text.splitlines() if "| srm_pairs" in x)
        # By hand: closures 10 / 20 and 16 / 20; the deviation divides by n - 1.
        assert "| 58.0 ± 11.3 |" in row and "| 0.650 ± 0.212 |" in row and "old" not in text
    assert len(list(pictures.glob("*_[12].jpg"))) == len(list(pictures.iterdir())) == 4
    assert Image.open(pictures / "wrong_2.jpg").getpixel((4, 4))[0] == pytest.approx(60, abs=5)

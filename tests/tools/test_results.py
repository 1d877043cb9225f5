import json

import pytest
import results
from PIL import Image

PQ_TH = {"score": (40, 50), "srm_pairs": (50, 66), "oracle": (60, 70)}  # of two seeds


def finished_run(folder, seed):
    """A run, as far as the script reads it."""
    for name in ("pictures", "pictures_still_wrong"):
        (folder / name).mkdir(parents=True)
        for k in range(3):
            Image.new("RGB", (8, 8), (60 * k, 0, 0)).save(folder / name / f"{k:03}_{90 - k}.png")
    orders = {x: dict.fromkeys(results.METRICS, values[seed - 1]) for x, values in PQ_TH.items()}
    content = {"orderings": orders, "images": 7, "seconds": {"train": 90.0, "eval": None}}
    (folder / "orderings.json").write_text(json.dumps(content))
    config = f"SEED: {seed}\nSOLVER: {{MAX_ITER: 5}}\nMODEL: {{OANET: {{ORDER: srm_pairs}}}}"
    (folder / "config.yaml").write_text(config)
    return str(folder)


def test_tables_and_pictures(tmp_path, monkeypatch):
    pictures = tmp_path / "docs" / "pictures"
    pictures.mkdir(parents=True)
    pages = [tmp_path / "README.md", tmp_path / "docs" / "RESULTS.md"]
    for page in pages:
        page.write_text("before\n<!-- tools/results.py fills this in -->\nold\n<!-- end -->\nafter\n")
    runs = [finished_run(tmp_path / str(seed), seed) for seed in (1, 2)]
    monkeypatch.setattr("sys.argv", ["results.py", "--root", str(tmp_path), *runs])
    results.main()
    for page in pages:
        text = page.read_text()
        assert text.startswith("before\n<!--") and text.endswith("<!-- end -->\nafter\n")
        row = next(x for x in text.splitlines() if x.startswith("| srm_pairs"))
        # By hand: closures 10 / 20 and 16 / 20; the deviation divides by n - 1.
        assert "| 58.0 ± 11.3 |" in row and "| 0.650 ± 0.212 |" in row and "old" not in text
    names = sorted(path.name for path in pictures.iterdir())
    assert names == ["right_1.jpg", "right_2.jpg", "wrong_1.jpg", "wrong_2.jpg"]
    assert Image.open(pictures / "wrong_2.jpg").getpixel((4, 4))[0] == pytest.approx(60, abs=5)
    with pytest.raises(ValueError, match=r"README\.md"):
        results.fill_region(pages[0], "tools/other.py", "text")

"""A million segments: in one image they are refused, in many they are loaded, in bounded memory."""

import json
import subprocess
import sys

import pytest

SIZE = 64
LOAD = """
import re, sys
from oanet_d2.data.check import check
from oanet_d2.data.register import category_metadata, load_panoptic, read_annotations

def peak():
    # MiB, of this process alone: getrusage counts from the parent's at the fork.
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) / 1024

before, (panoptic_json, instances_json) = peak(), sys.argv[1:]
metadata = category_metadata(read_annotations(panoptic_json, "categories")["categories"], "")
ids = [metadata[f"{x}_dataset_id_to_contiguous_id"] for x in ("thing", "stuff")]
try:
    dicts = load_panoptic("images", panoptic_json, "pngs", instances_json or None, *ids)
    print(len(dicts), sum(len(d["segments_info"]) for d in dicts))
except ValueError as error:
    print(error)
print(round(peak() - before))
kinds = {p.kind for p in check("i", panoptic_json, "p", instances_json or None, 0, False)}
print(sorted(kinds - {"image missing", "PNG missing"}))
print(round(peak() - before))
"""


def write(folder, num_images, segments_each, instances_each=0):
    images, annotations, instances = [], [], []
    for i in range(num_images):
        images.append({"id": i, "file_name": f"{i}.jpg", "height": SIZE, "width": SIZE})
        segments = [
            {"id": k, "category_id": 1, "area": 1, "iscrowd": 0, "bbox": [0, 0, 1, 1]}
            for k in range(1, segments_each + 1)
        ]
        annotations.append({"image_id": i, "file_name": f"{i}.png", "segments_info": segments})
        instances += [
            {"id": k, "image_id": i, "category_id": 1, "bbox": [0, 0, 1, 1], "iscrowd": 0,
             "area": 1, "segmentation": [[0, 0, 1, 0, 1, 1]]}
            for k in range(instances_each)
        ]
    content = {"images": images, "categories": [{"id": 1, "name": "x", "isthing": 1}]}
    paths = [folder / "panoptic.json", folder / "instances.json"]
    for path, entries in zip(paths, (annotations, instances)):
        path.write_text(json.dumps({**content, "annotations": entries}))
    return str(paths[0]), str(paths[1]) if instances_each else ""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
@pytest.mark.parametrize(
    "counts, said, found",
    [
        ((10_000, 100), "10000 1000000", []),
        ((1, 1_000_000), "0.png has 1,000,000 segments; there may be", ["too many segments"]),
        ((1, 1, 1_000_000), "0.jpg has 1,000,000 instances; there", ["too many instances"]),
    ],
)
def test_a_million(tmp_path, capsys, subprocess_env, counts, said, found):
    command = [sys.executable, "-W", "ignore", "-c", LOAD, *write(tmp_path, *counts)]
    output = subprocess.run(
        command, env=subprocess_env, check=True, capture_output=True, text=True, timeout=1200
    ).stdout.splitlines()
    with capsys.disabled():
        print(f"\n{counts}: peak memory {output[1]} MiB to load, {output[3]} to check")
    assert said in output[0]
    assert output[2] == str(found)
    assert max(float(output[1]), float(output[3])) < 4096

from setuptools import find_packages, setup

setup(
    name="oanet_d2",
    version="0.1.0",
    description="OANet for Detectron2: panoptic segmentation with a learned painting order",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["oanet_d2", "oanet_d2.*"]),
    package_data={"oanet_d2.report": ["template/*"]},
    # What trains and what only predicts have little in common, and each wants its own OpenCV. So both
    # are extras: `.[train]` or `.[runtime]`, not both in one environment.
    # No upper bounds: what is already installed stays as it is.
    install_requires=["numpy>=1.23"],
    extras_require={
        # Detectron2 is missing on purpose: it is not on the package index under its own name, and its
        # users bring a build that fits their torch and CUDA. `make` installs one (see Makefile).
        "train": [
            "torch>=1.13",
            "torchvision>=0.14",  # Detectron2 imports it and does not declare it
            "opencv-python>=4.5",
            "pillow>=9",
            "pycocotools>=2.0.2",
            "fvcore>=0.1.5",
            "iopath>=0.1.9",
            "pyyaml",
            "safetensors",
            "tabulate",
            "tqdm",
            "jinja2",
            "scipy",
            "shapely",  # fvcore's crop of polygon masks imports it and does not declare it
            # The module `panopticapi`. It asks for numpy<2, though it works with NumPy 2: to keep a
            # newer NumPy, `pip install --no-deps -e . panopticapi-lite`. Where the original
            # panopticapi is installed already, `pip install --no-deps -e .`.
            "panopticapi-lite>=0.2.0",
        ],
        # An exported model, and demo/demo.py with it. On a server without libGL; a window of the demo
        # needs opencv-python instead. For a GPU, onnxruntime-gpu instead of onnxruntime.
        "runtime": ["onnxruntime>=1.17", "opencv-python-headless>=4.5", "pillow>=9", "tqdm"],
        "export": ["onnx>=1.16", "onnxruntime>=1.17", "onnxscript>=0.5"],  # with `train`
        "test": ["pytest", "pytest-xdist", "pytest-cov", "hypothesis", "playwright", "onnxruntime"],
        "lint": ["ruff", "mypy"],
        "cityscapes": ["cityscapesscripts"],
        "timm": ["timm>=1.0.9"],  # other backbones
    },
)

from setuptools import find_packages, setup

setup(
    name="oanet_d2",
    version="0.1.0",
    description="OANet for Detectron2: panoptic segmentation with a learned painting order",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["oanet_d2", "oanet_d2.*"]),
    package_data={"oanet_d2.report": ["template/*"]},
    # Detectron2 is missing on purpose: it is not on the package index under its own name, and its
    # users bring a build that fits their torch and CUDA. `make` installs one (see Makefile).
    # No upper bounds: what is already installed stays as it is.
    install_requires=[
        "torch>=1.13",
        "torchvision>=0.14",  # Detectron2 imports it and does not declare it
        "numpy>=1.23",
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
        # The module `panopticapi`. It asks for numpy<2, though it works with NumPy 2: to keep a newer
        # NumPy, `pip install --no-deps -e . panopticapi-lite`. Where the original panopticapi is
        # installed already, `pip install --no-deps -e .`.
        "panopticapi-lite>=0.2.0",
    ],
    extras_require={
        "test": ["pytest", "pytest-xdist", "pytest-cov", "hypothesis", "playwright"],
        "lint": ["ruff", "mypy"],
        "cityscapes": ["cityscapesscripts"],
        "timm": ["timm>=1.0.9"],  # other backbones
    },
)

"""Installation: distribution `dinov2-3d`, package `dinov2`; the YAML recipes of `configs/` go along as `dinov2.recipes`."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION: dict[str, str] = {}
exec((HERE / "dinov2" / "version.py").read_text(), VERSION)

setup(
    name="dinov2-3d",
    version=VERSION["__version__"],
    description="Self-supervised pretraining of 3D vision transformers on medical volumes (3DINO)",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE", "NOTICE"],
    python_requires=">=3.11",
    packages=[*find_packages(include=["dinov2", "dinov2.*"]), "dinov2.recipes"],
    package_dir={"dinov2.recipes": "configs"},
    package_data={"dinov2.configs": ["*.yaml", "train/*.yaml"], "dinov2.recipes": ["**/*.yaml"]},
    py_modules=["dinov2_3d"],
    install_requires=[
        "torch>=2.11,<3",
        "monai>=1.4,<2",
        "omegaconf>=2.3,<3",
        "numpy>=1.26",
        "nibabel>=5.2",
        "tensorboard>=2.16",
        "scipy>=1.11",
        "matplotlib>=3.8",
        "nilearn>=0.11",
    ],
    extras_require={"cuda": ["xformers"], "test": ["pytest>=8", "hypothesis>=6", "ruff>=0.9", "build"]},
    entry_points={"console_scripts": ["dinov2=dinov2_3d:main"]},
)

"""Installation: distribution `dinov2-3d`, package `dinov2`; the YAML recipes of `configs/` go along as `dinov2.recipes`.

Where a C++ compiler and torch are at hand, `csrc/` becomes the compiled operators; where not, installation succeeds without
them and the same operations run in plain PyTorch, slower (`dinov2 doctor` says which).
"""

import sys
from pathlib import Path
from subprocess import SubprocessError

from setuptools import find_packages, setup
from setuptools.errors import BaseError

HERE = Path(__file__).parent
VERSION: dict[str, str] = {}
exec((HERE / "dinov2" / "version.py").read_text(), VERSION)


def compiled_operators() -> dict:
    """The extension's arguments for `setup`; none without torch.

    The module carries the torch release it was compiled for in its name, so that it is never loaded into another.
    """
    try:
        import torch
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError:
        sys.stderr.write("dinov2-3d: torch is not installed, the compiled operators are left out\n")
        return {}

    class Optional(BuildExtension):
        """A failed compilation is said and survived."""

        def __init__(self, *args, **kwargs) -> None:
            super().__init__(*args, **{**kwargs, "no_python_abi_suffix": False})

        def run(self) -> None:
            try:
                super().run()
            except (BaseError, RuntimeError, OSError, SubprocessError) as err:
                self.extensions = []  # so that nothing looks for what was not made
                sys.stderr.write(f"dinov2-3d: the compiled operators are left out: {str(err).splitlines()[0]}\n")

    release = torch.__version__.split("+")[0].replace(".", "_")
    sources = sorted(str(p.relative_to(HERE)) for p in (HERE / "csrc").rglob("*.cpp"))
    flags = [] if sys.platform == "win32" else ["-O3", "-Wno-psabi", "-fvisibility=hidden"]
    threads = ["-fopenmp"] if sys.platform == "linux" else []  # without it at::parallel_for is serial
    extension = CppExtension(
        f"dinov2._C_torch_{release}", sources, extra_compile_args={"cxx": flags + threads}, extra_link_args=["-s", *threads]
    )
    extension.depends = sorted(str(p.relative_to(HERE)) for p in (HERE / "csrc").rglob("*.h"))
    return {"ext_modules": [extension], "cmdclass": {"build_ext": Optional}}


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
        "pydicom>=3,<4",
        "SimpleITK>=2.3,<3",
        "blosc2>=3",
        "safetensors>=0.4",
        "submitit>=1.5",
        "tensorboard>=2.16",
        "tqdm>=4.60",
        "scipy>=1.11",
        "matplotlib>=3.8",
        "nilearn>=0.11",
    ],
    extras_require={"cuda": ["xformers"], "test": ["pytest>=8", "hypothesis>=6", "ruff>=0.9", "build"]},
    entry_points={"console_scripts": ["dinov2=dinov2_3d:main"]},
    **compiled_operators(),
)

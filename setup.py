"""The compiled operators of `csrc/`; what else an installation is (names, packages needed, extras) pyproject.toml says.

Where a C++ compiler and torch are at hand, `csrc/` becomes the compiled operators, with nvcc and a CUDA torch the CUDA kernels
too; where not, installation succeeds without them and the same operations run in plain PyTorch, slower (`dinov2 doctor` says
which). The torch is that of the environment that is installed into: none is fetched to compile with. FORCE_CUDA=1 fails rather
than leave the CUDA kernels out, FORCE_CUDA=0 leaves them out; TORCH_CUDA_ARCH_LIST chooses GPU architectures.
"""

import os
import sys
import sysconfig
from pathlib import Path
from subprocess import SubprocessError

from setuptools import Extension, find_packages, setup
from setuptools.errors import BaseError

HERE = Path(__file__).parent
FORCE_CUDA = os.environ.get("FORCE_CUDA") == "1"
CUDA_ARCHITECTURES = "7.5;8.0;9.0+PTX"  # what every toolkit of CUDA 12 and 13 knows; newer GPUs compile the PTX when first used
PYTHON_ABI = "cp311"  # a module holds one function of Python's stable interface: it serves every Python from this one on
CXX_FLAGS = [] if sys.platform == "win32" else ["-O3", "-Wno-psabi", "-fvisibility=hidden"]


def compiled_operators() -> dict:
    """The extensions' arguments for `setup`; none without torch.

    The CPU operators are one module, the CUDA kernels another, which is left out where it cannot be built; whether a GPU is
    visible is not asked. A module carries the torch release it was compiled for in its name, so that it is never loaded into
    another.
    """
    show_environment()
    try:
        import torch
        from torch.utils.cpp_extension import BuildExtension
    except ImportError:
        sys.stderr.write("dinov2-3d: torch is not installed here, the compiled operators are left out\n")
        return {}

    class Optional(BuildExtension):
        """A module that cannot be compiled is said and left out; with FORCE_CUDA=1 the CUDA one must be."""

        def __init__(self, *args, **kwargs) -> None:
            super().__init__(*args, **{**kwargs, "no_python_abi_suffix": False})

        def run(self) -> None:
            wanted, compiler, made = self.extensions, self.compiler, []
            for extension in wanted:
                self.extensions, self.compiler = [extension], compiler  # run() replaces the compiler's name by itself
                try:
                    super().run()
                    made.append(extension)
                except (BaseError, RuntimeError, OSError, SubprocessError) as err:
                    if FORCE_CUDA and "_cuda_" in extension.name:
                        raise
                    reason = str(err).splitlines()[0]
                    sys.stderr.write(f"dinov2-3d: the compiled operators ({extension.name}) are left out: {reason}\n")
            self.extensions = made  # so that nothing looks for what was not made

    release = torch.__version__.split("+")[0].replace(".", "_")
    extensions = [cpu_module(release)]
    obstacle = cuda_obstacle()
    if obstacle is None:
        extensions.append(cuda_module(release))
    elif FORCE_CUDA:
        raise SystemExit(f"dinov2-3d: FORCE_CUDA=1, but {obstacle}")
    options = {"bdist_wheel": {"py_limited_api": PYTHON_ABI}}
    return {"ext_modules": extensions, "cmdclass": {"build_ext": Optional}, "options": options}


def show_environment() -> None:
    """Let Python see the packages of the environment that is installed into, which pip hides from a build, after its own.

    They are where this interpreter's own paths say; another front end (uv, build) has a separate environment with another
    interpreter, where there is no torch to be seen.
    """
    sys.path.extend(path for path in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")} if path not in sys.path)


def sources(*suffixes: str, cuda: bool) -> list[str]:
    """Files of `csrc/` by suffix: those of the `cuda` folders, or all others."""
    found = (p.relative_to(HERE) for p in sorted((HERE / "csrc").rglob("*")) if p.suffix in suffixes)
    return [str(p) for p in found if ("cuda" in p.parts) == cuda]


def cpu_module(release: str) -> Extension:
    """All operators, for the CPU."""
    from torch.utils.cpp_extension import CppExtension

    # without it at::parallel_for is serial; not linked with: what is called is torch's own OpenMP, which set_num_threads is of
    threads = ["-fopenmp"] if sys.platform == "linux" else []
    return CppExtension(
        f"dinov2._C_torch_{release}",
        sources(".cpp", cuda=False),
        depends=sources(".h", ".inc", cuda=False),
        extra_compile_args={"cxx": CXX_FLAGS + threads},
        extra_link_args=["-s"],
        py_limited_api=True,
    )


def cuda_obstacle() -> str | None:
    """Why the CUDA kernels cannot be built here; None where they can."""
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    if os.environ.get("FORCE_CUDA") == "0":
        return "FORCE_CUDA=0"
    if torch.version.cuda is None:
        return "this torch is a CPU-only build: install one for CUDA"
    if CUDA_HOME is None:
        return "there is no CUDA toolkit (nvcc): install one, or set CUDA_HOME"
    return None


def cuda_module(release: str) -> Extension:
    """The CUDA kernels; they join operators that the CPU module declares."""
    from torch.utils.cpp_extension import CUDAExtension

    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", CUDA_ARCHITECTURES)  # torch would ask the GPUs that it sees
    return CUDAExtension(
        f"dinov2._C_cuda_torch_{release}",
        ["csrc/extension.cpp", *sources(".cpp", ".cu", cuda=True)],
        depends=sources(".h", ".inc", cuda=False) + sources(".h", cuda=True),
        extra_compile_args={"cxx": CXX_FLAGS, "nvcc": ["-O3", "-Xcompiler", "-fvisibility=hidden"]},
        extra_link_args=["-s"],
        py_limited_api=True,
    )


setup(
    packages=[*find_packages(include=["dinov2", "dinov2.*"]), "dinov2.recipes"],
    **compiled_operators(),
)

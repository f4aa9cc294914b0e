"""The steps of scripts/release: build from the last commit, look into the wheel, install it into fresh environments and use it.

What it ends with is the table of environments. Nothing is uploaded.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYTHONS = ["python3.11", "python3.12", "python3.13"]
TORCH_LIBRARIES = ["libc10.so", "libtorch.so", "libtorch_cpu.so", "libgomp*"]  # are torch's: no wheel of ours carries them
BUILD = "import sys; from setuptools import build_meta as b; to = sys.argv[1]; b.build_sdist(to); b.build_wheel(to)"
IN_THE_WHEEL = [  # what it must hold, beside the code: licences of all that comes along, weights, scans, recipes, the operators
    "dist-info/licenses/LICENSE", "dist-info/licenses/NOTICE", "dist-info/licenses/.*NIIVUE_LICENSE",
    "visual/assets/NIIVUE_LICENSE", "visual/assets/niivue.umd.js", "weights/README.md", "weights/demo.safetensors",
    "demo/scans/README.md", "demo/scans/.*.nii.gz", "recipes/pretrain/vit_large.yaml", r"dinov2/_C_torch_[0-9_]+\.abi3\.so",
]  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/release", description=__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "dist", help="folder of the two files; default: dist")
    parser.add_argument("--no-check", action="store_true", help="build only")
    parser.add_argument("--python", nargs="+", default=PYTHONS, help="that are tried where they are present")
    parser.add_argument("--torch", nargs="+", default=["oldest", "newest"], help="oldest, newest, or versions")
    parser.add_argument("--torch-index", help="index of torch's packages, for example PyTorch's CPU wheels")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="release") as folder:
        wheel, archive = build(Path(folder), args.output)
        look_into(wheel)
        print(
            f"{wheel}: {wheel.stat().st_size / 2**20:.1f} MiB\n{archive}: {archive.stat().st_size / 2**20:.1f} MiB", flush=True
        )
        return 0 if args.no_check else check(Path(folder), wheel, archive, args)


def build(folder: Path, output: Path) -> tuple[Path, Path]:
    """The wheel and the source archive of the last commit, in `output`."""
    source, raw = folder / "source", folder / "raw"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(source)], check=True)
    raw.mkdir()
    subprocess.run([sys.executable, "-W", "ignore", "-c", BUILD, str(raw)], cwd=source, check=True, stdout=subprocess.DEVNULL)
    (archive,), (wheel,) = raw.glob("*.tar.gz"), raw.glob("*.whl")
    (folder / "tagged").mkdir()
    excluded = [word for name in TORCH_LIBRARIES for word in ("--exclude", name)]
    if shutil.which("auditwheel") and shutil.which("patchelf"):
        subprocess.run(["auditwheel", "repair", *excluded, "-w", str(folder / "tagged"), str(wheel)], check=True)
        (wheel,) = (folder / "tagged").glob("*.whl")
    else:
        print("without auditwheel and patchelf the wheel is for machines like this one (tag linux_...)")
    return Path(shutil.copy(wheel, output)), Path(shutil.copy(archive, output))


def look_into(wheel: Path) -> None:
    """Stop where the wheel lacks something, or holds what it should not."""
    names = zipfile.ZipFile(wheel).namelist()
    lacks = [pattern for pattern in IN_THE_WHEEL if not any(re.search(pattern, name) for name in names)]
    strange = [n for n in names if not re.match(r"dinov2/|dinov2_3d\.py$|dinov2_3d-.*\.dist-info/", n)]
    if lacks or strange:
        raise SystemExit(f"{wheel.name}: lacks {lacks}, holds {strange}")


def check(folder: Path, wheel: Path, archive: Path, args: argparse.Namespace) -> int:
    """Install the wheel for each Python and torch, then both files for the pinned one; 1 where something does not work.

    With the pinned torch the operators must be compiled: the wheel brings them, the archive builds them while pip isolates it.
    """
    floor = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"][0]
    pinned = next(line for line in (ROOT / "requirements.txt").read_text().splitlines() if line.startswith("torch=="))
    versions = {"oldest": re.sub(r"torch>=([\d.]+).*", r"torch==\1.*", floor), "newest": "torch"}
    pythons = [found for name in args.python if (found := usable(name))]
    rows = [(python, versions.get(t, f"torch=={t}"), wheel) for python in pythons for t in args.torch]
    rows += [(pythons[0], pinned, file) for file in (wheel, archive)] if pythons else []
    said = []
    for i, row in enumerate(rows):
        line = try_out(folder / f"env{i}", *row, args.torch_index)
        if row[1] == pinned and "operators: compiled" not in line:
            line += ": FAILED: the operators are not compiled"
        print(line, flush=True)
        said.append(line)
    return int(any("FAILED" in line for line in said) or not said)


def usable(name: str) -> str | None:
    """The interpreter where it is one (a shim of pyenv may be none)."""
    path = shutil.which(name)
    is_one = path and subprocess.run([path, "-c", "import venv, ensurepip"], capture_output=True).returncode == 0
    return path if is_one else None


def try_out(env: Path, python: str, torch: str, file: Path, index: str | None) -> str:
    """A fresh environment: torch, then the file with what it needs, then the smoke test; its line. The folder goes again."""
    name = f"{'source archive' if file.suffix == '.gz' else 'wheel'}, {Path(python).name}, {torch}"
    pip = [str(env / "bin" / "python"), "-m", "pip", "-q", "--disable-pip-version-check", "--no-cache-dir"]
    steps = [
        [python, "-m", "venv", str(env)],
        [*pip, "install", *(["--index-url", index] if index else []), torch],
        [*pip, "install", str(file), torch],
        [*pip, "check"],
        [str(env / "bin" / "python"), "-I", str(ROOT / "scripts" / "release_smoke.py"), str(env)],
    ]
    try:
        for step in steps:
            done = subprocess.run(step, cwd=env.parent, capture_output=True, text=True)
            if done.returncode != 0:
                return f"{name}: FAILED: {' '.join(step[-3:])}: {' '.join((done.stderr or done.stdout).split())[-600:]}"
        return f"{name}: {done.stdout.splitlines()[-1]}"
    finally:
        shutil.rmtree(env, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())

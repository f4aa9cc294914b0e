"""Start of the console command: makes sure that the `dinov2` which Python imports is this project's.

Meta's DINOv2 has the same import name. Where both are installed, one hides the other, and no message from inside the
package could say so.
"""

import sys

HOW_TO_SEPARATE = (
    "the package `dinov2` that Python imports here ({path}) is not that of dinov2-3d: most likely Meta's DINOv2, which has "
    "the same name. Install each in an environment of its own (`pip uninstall dinov2`, `pip install --force-reinstall "
    "dinov2-3d`), or take the other one's folder out of PYTHONPATH."
)


def main() -> int:
    """Run the command line; exit code 2 and one line where another `dinov2` is in the way."""
    import dinov2

    if getattr(dinov2, "__distribution__", "") != "dinov2-3d":
        sys.stderr.write(HOW_TO_SEPARATE.format(path=getattr(dinov2, "__file__", "no file")) + "\n")
        return 2
    from dinov2.cli import main as cli_main
    from dinov2.start import start_program

    start_program()
    return cli_main()

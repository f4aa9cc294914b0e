"""PCA and attention pictures of a scan by 3DINO's flags: `python dinov2/eval/vis_pca.py --image-path S --vis-type pca ...`.

A door to `dinov2 visualize`, which has more: joint bases, similarity, finer steps, the page.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # started as a file: the repository, not this folder, is where imports begin
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    from dinov2.start import start_program  # its package comes before torch and decides how threads wait

    start_program()

from dinov2.errors import replaced
from dinov2.eval.visualize import Request, open_encoder, visualize
from dinov2.program import run_program

logger = logging.getLogger("dinov2.eval.vis_pca")

KINDS = {"pca": "pca", "mhsa": "attention"}
get_pca_feat_vector = replaced("dinov2.eval.vis_pca.get_pca_feat_vector", "dinov2.features.pca.fit_basis")


def get_args_parser() -> argparse.ArgumentParser:
    """3DINO's flags."""
    parser = argparse.ArgumentParser("vis_pca.py", description="PCA of patch tokens, or attention, of one scan.")
    add = parser.add_argument
    add("--config-file", help="of the network, for weights that do not tell")
    add("--pretrained-weights", required=True, help="weights, as of every program here")
    add("--output-dir", type=Path, required=True, help="gets orig.nii.gz and nifti_<component or head>.nii.gz")
    add("--image-path", type=Path, required=True, help="the scan: a file or a DICOM folder")
    add("--vis-type", choices=KINDS, default="pca")
    add("--input-type", choices=("full_image", "resize", "sliding_window"), default="full_image")
    add("--cache-dir", help="accepted; the scan is read once and not cached")
    add("--opts", nargs="*", default=[], metavar="key=value", help="of the configuration")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return run_program(run, get_args_parser(), argv)


def run(args: argparse.Namespace) -> int:
    encoder = open_encoder(args.pretrained_weights, args.config_file, args.opts)
    request = Request(((args.image_path,),), KINDS[args.vis_type], args.output_dir, args.input_type)
    return visualize(request, encoder, logger.info)


if __name__ == "__main__":
    sys.exit(main())

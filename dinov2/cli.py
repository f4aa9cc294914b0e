"""The `dinov2` command: sub-commands that call the same functions as the programs and the Python interface."""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dinov2.errors import EXIT_BAD_INPUT, EXIT_OK, EXIT_RESUMABLE, BadInput
from dinov2.files import refuse_output, shown, words, write_text
from dinov2.geometry import triple
from dinov2.logging import setup_logging
from dinov2.optional import DRAWING, missing_line, require
from dinov2.version import __version__

if TYPE_CHECKING:
    from dinov2.data import Datalist

    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

logger = logging.getLogger(__name__)

EXIT_PIPE = 128 + signal.SIGPIPE  # as of a program that the signal ends

PROGRAMS = {  # sub-commands whose words all go to a program's own `main`: its module, what it does
    "train": ("dinov2.run.train.pretrain", "pretrain"),
    "segment": ("dinov2.eval.segmentation3d", "train and test a segmentation on a labelled set"),
    "linear": ("dinov2.eval.linear3d", "linear probing of a classification"),
    "knn": ("dinov2.eval.knn", "a classification by nearest neighbours of frozen features"),
    "logistic": ("dinov2.eval.log_regression", "a classification by logistic regression on frozen features"),
    "ridge": ("dinov2.eval.regression", "a number, such as age, by ridge regression on frozen features"),
}


def say(text: str) -> None:
    """The command's output, as opposed to its log."""
    encoding = sys.stdout.encoding or "utf-8"  # that of the terminal may lack letters of a name
    sys.stdout.write(text.encode(encoding, "backslashreplace").decode(encoding) + "\n")


def config_show(args: argparse.Namespace) -> int:
    """Print a configuration with every key's meaning."""
    from dinov2.configs import default_yaml, load_and_merge_config_3d

    say(default_yaml(load_and_merge_config_3d(args.config, args.overrides)).rstrip())
    return EXIT_OK


def config_check(args: argparse.Namespace) -> int:
    """Say whether a configuration can be used, and what a run of it amounts to."""
    from dinov2.configs import load_and_merge_config_3d
    from dinov2.train.forecast import forecast_gib
    from dinov2.train.schedules import build_schedules, with_derived_lr

    cfg = with_derived_lr(load_and_merge_config_3d(args.config, args.overrides), 1)
    schedules = build_schedules(cfg)
    batch = cfg.train.batch_size_per_gpu * cfg.train.accumulation_steps
    say(
        f"{args.config}: valid; {schedules.total_iters} iterations of {batch} volumes per rank, "
        f"peak learning rate {schedules.lr.base:.3g} on one rank"
    )
    sizes = sorted({16, 32, 64, 128, cfg.train.batch_size_per_gpu})
    forecasts = ", ".join(f"{forecast_gib(cfg, b, cfg.train.compile is not False):.0f} GiB for {b}" for b in sizes)
    say(f"memory of a GPU by volumes a pass (forecast, one process): {forecasts}")
    return EXIT_OK


def demo(args: argparse.Namespace) -> int:
    """What the encoder that comes along sees, what that is good for, and a training of your own: four minutes."""
    if args.practice:
        from dinov2.demo.practice import write_practice

        write_practice(args.practice)
        say(f"{args.practice}: made heads to try commands on: scans, people.csv, nnUNet_raw")
        return EXIT_OK
    if args.data is None:
        require("the quick start without --data", "nilearn")
    from dinov2.demo.run import run_demo

    return run_demo(args.output, args.data, args.seed, args.overrides, say)


def doctor(args: argparse.Namespace) -> int:
    """Say what this machine has, what is missing and what that means."""
    from dinov2.doctor import report

    if args.report:
        refuse_output(args.report, "--report")
    text = report()
    say(text)
    if args.report:
        try:
            write_text(args.report, text + "\n")
        except OSError as err:
            raise BadInput(f"--report {args.report}: {err.strerror}: choose another file") from err
    return EXIT_OK


def watch(args: argparse.Namespace) -> int:
    """Show how a pretraining goes, on one screen, from the files of its folder."""
    from dinov2.watch import watch as run_watch

    return run_watch(args.folder, args.once, say)


def cache_build(args: argparse.Namespace) -> int:
    """Preprocess every volume of a datalist into a cache folder; a second call continues."""
    from dinov2.data.cache.commands import build
    from dinov2.data.pool import default_workers

    workers = default_workers() if args.workers is None else args.workers
    return build(_datalist(args), args.cache_dir, args.max_gb, workers, say)


def cache_verify(args: argparse.Namespace) -> int:
    """Read every cached volume against its checksum and look for every volume of a datalist."""
    from dinov2.data.cache.commands import verify

    return verify(_datalist(args), args.cache_dir, args.remove, say)


def cache_stats(args: argparse.Namespace) -> int:
    """Count what a cache folder holds, and how large it is."""
    from dinov2.data.cache.commands import stats

    return stats(_datalist(args), args.cache_dir, say)


def recipe_check(args: argparse.Namespace) -> int:
    """Load and draw three cases of a downstream dataset, and say what looks wrong with its recipe or data."""
    from dinov2.data.downstream.check import check_recipe

    return check_recipe(args.recipe, args.base_data_dir, args.output_dir, say)


def predict(args: argparse.Namespace) -> int:
    """Segment scans by a trained network, each on its file's own grid and orientation."""
    from dinov2.eval.segmentation_3d.predict import predict as run_predict

    return run_predict(args.weights, args.input, args.output, args.overlap, say, args.encoder)


def classify(args: argparse.Namespace) -> int:
    """Say the class of scans by a saved probe."""
    from dinov2.eval.probing.saved_probe import classify as run_classify

    return run_classify(args.probe, args.input, args.pretrained_weights, args.output, say, args.encoder)


def index(args: argparse.Namespace) -> int:
    """List the volumes below folders, checked and described; what cannot be used is set aside with its reason."""
    from dinov2.data.corpus.index.command import IndexRequest, merge, parse_shard, refuse_outputs
    from dinov2.data.corpus.index.command import index as run_index
    from dinov2.data.corpus.index.examine import ExamineOptions
    from dinov2.data.corpus.index.metadata import compile_pattern
    from dinov2.data.corpus.index.quality import Limits
    from dinov2.data.pool import default_workers

    request = IndexRequest(
        output=args.output,
        quarantine=args.quarantine,
        limits=Limits(args.min_axis, args.max_nan),
        examine=ExamineOptions(
            pattern=compile_pattern(args.pattern) if args.pattern else None,
            fourth_axis=args.fourth_axis,
            spacing_mm=tuple(args.spacing) if args.spacing else None,
            keep_ids=args.keep_ids,
            id_salt=args.id_salt,
        ),
        shard=parse_shard(args.shard),
        num_workers=default_workers() if args.workers is None else args.workers,
    )
    refuse_outputs(request, args.report)
    if args.report:
        require("--report", "matplotlib")
    code = merge(args.folders, request, say) if args.merge else run_index(args.folders, request, say)
    if code != EXIT_RESUMABLE and args.report:
        from dinov2.data.corpus.report import write_report

        write_report(args.output, request.quarantine_path, args.report)
        say(f"{args.report}: open it in a browser")
    return code


def curate(args: argparse.Namespace) -> int:
    """Choose the volumes of a list to train on, by a file of rules."""
    from dinov2.data.corpus.curation import curate as run_curate

    refuse_output(args.output, "--output")
    return run_curate(args.list, args.rules, args.output, args.explain, say)


def overlap(args: argparse.Namespace) -> int:
    """Look for scans and patients that two lists share; exit code 2 where there are any."""
    from dinov2.data.corpus.overlap import overlap as run_overlap

    return run_overlap(args.first, args.second, say)


def compare(args: argparse.Namespace) -> int:
    """Compare runs on the same test items: means with intervals, differences with tests and effect sizes."""
    from dinov2.eval.study.compare import compare as run_compare
    from dinov2.eval.study.figures import draw_comparison

    if args.output is not None and not args.no_figures:
        require("--output with figures (without: --no-figures)", *DRAWING)
    return run_compare(args.runs, args.output, say, None if args.no_figures else draw_comparison)


def figure_corpus(args: argparse.Namespace) -> int:
    """Draw what a datalist holds: volumes by organ and modality."""
    from dinov2.data.corpus.report import draw_list

    say(f"{args.output / 'corpus'}.png, .pdf, .csv: {draw_list(args.list, args.output)} volumes")
    return EXIT_OK


def figure_octants(args: argparse.Namespace) -> int:
    """Draw where the deformable attention looks before it is trained: a head an octant."""
    from dinov2.eval.segmentation_3d.deformable import octant_offsets
    from dinov2.visual.figures.drawings import draw_octants

    try:
        draw_octants(octant_offsets(args.points).numpy(), args.output / "octants")
    except OSError as err:
        raise BadInput(f"--output {args.output}: {err.strerror}: choose another folder") from err
    say(f"{args.output / 'octants'}.png, .pdf, .csv: written")
    return EXIT_OK


def probe(args: argparse.Namespace) -> int:
    """Cross-validate what a table of features knows of a column of another table, beside simpler numbers."""
    from dinov2.eval.crossval.command import ProbeRequest
    from dinov2.eval.crossval.command import probe as run_probe

    covariates = tuple(name.strip() for name in (args.covariates or "").split(",") if name.strip())
    same = {name: getattr(args, name) for name in ("features", "table", "target", "output", "group", "key", "task")}
    numbers = {name: getattr(args, name) for name in ("parts", "folds", "repeats", "seed")}
    request = ProbeRequest(
        **same, **numbers, covariates=covariates, untrained=tuple(args.untrained), reads_scans=not args.no_scans
    )
    return run_probe(request, say)


def embed(args: argparse.Namespace) -> int:
    """Write a Parquet table of features, a row a scan; continued after a stop."""
    from dinov2.checkpointer.teacher import RANDOM
    from dinov2.data.corpus.index.command import parse_shard
    from dinov2.data.pool import default_workers
    from dinov2.features.embed import EmbedRequest, device_of_rank, shard_of_rank
    from dinov2.features.embed import embed as run_embed
    from dinov2.features.encoder import load_encoder
    from dinov2.features.spacing import spacing_of
    from dinov2.features.views import View

    request = EmbedRequest(
        output=args.output,
        view=View(args.mode, args.size, args.overlap, args.layers, args.batch_size, spacing_of(args.spacing)),
        patch_tokens=args.patch_tokens,
        shard=shard_of_rank(parse_shard(args.shard)),
        num_workers=default_workers() if args.workers is None else args.workers,
    )
    refuse_output(args.output, "--output")
    if not args.source.exists():
        raise BadInput(f"{args.source}: no such list or folder")
    device = device_of_rank(args.device)
    encoder = load_encoder(args.weights, device, args.config_file, args.dtype, args.untrained or 0, encoder=args.encoder)
    if args.untrained is not None:
        encoder = load_encoder(RANDOM, device, encoder.config, args.dtype, args.untrained, encoder=args.encoder)
    return run_embed(args.source, encoder, request, say)


def visualize(args: argparse.Namespace) -> int:
    """Show what a network sees in a scan: PCA of its patches, attention, similarity to a place."""
    from dinov2.eval.visualize import FOURTH_AXIS, Request, open_encoder
    from dinov2.eval.visualize import visualize as run_visualize

    request = Request(
        scans=(tuple(args.scan), *((path,) for path in args.joint)),
        kind=args.type,
        output=args.output,
        mode=args.input_type,
        size=args.size,
        overlap=args.overlap,
        step=args.step,
        block=args.layer,
        at_mm=tuple(args.at) if args.at else None,
        smooth=args.interpolation == "linear",
        axes=FOURTH_AXIS[args.fourth_axis],
        viewer=args.viewer,
    )
    return run_visualize(request, open_encoder(args.weights, args.config_file, (), args.device, args.dtype, args.encoder), say)


def retrieve(args: argparse.Namespace) -> int:
    """Show the scans of a table that are most similar to one, or the same place in them."""
    require("the page of `dinov2 retrieve`", "matplotlib")
    from dinov2.features.retrieval.command import RetrieveRequest
    from dinov2.features.retrieval.command import retrieve as run_retrieve

    request = RetrieveRequest(
        table=args.table,
        query=args.query,
        output=args.output,
        at_mm=triple(args.at) if args.at else None,
        k=args.k,
        where=tuple(args.where),
        exclude_same=tuple(args.exclude_same),
        features=args.features,
        weights=args.weights,
        config_file=args.config_file,
        device=args.device,
        base_data_dir=args.base_data_dir,
    )
    return run_retrieve(request, say)


def report(args: argparse.Namespace) -> int:
    """Write one page of a run: curves, crops, features, results, configuration, whatever its folder holds."""
    from dinov2.report.command import report as run_report

    return run_report(args.folder, args.output, args.scan, not args.no_examples, say)


def checkpoint_inspect(args: argparse.Namespace) -> int:
    """Say what weights or a training checkpoint hold."""
    from dinov2.checkpointer.export import describe

    say("\n".join(describe(args.path)))
    return EXIT_OK


def checkpoint_export(args: argparse.Namespace) -> int:
    """Write the teacher of a training checkpoint or weights file in another form."""
    forms = [form for form in (args.output, args.hf, args.onnx, args.monai_bundle) if form]
    if len(forms) != 1:
        raise BadInput(
            "checkpoint export: give one of OUTPUT (.pth, .safetensors), --hf DIR, --onnx FILE and --monai-bundle DIR"
        )
    if args.push and not args.hf:
        raise BadInput(f"--push {args.push}: is of the folder that --hf DIR writes: give both")
    if args.size and not args.onnx:
        raise BadInput("--size: is of the volumes of --onnx FILE: give both")
    if (args.chunks is not None or args.no_heads) and not args.output:
        raise BadInput(
            "--chunks, --no-heads: are of OUTPUT (.pth, .safetensors); other forms hold the backbone alone: leave them out"
        )
    if args.hf:
        return _export_for_transformers(args)
    if args.onnx:
        return _export_for_onnx(args)
    if args.monai_bundle:
        from dinov2.sharing.monai_bundle import write_bundle

        say(f"{args.monai_bundle}: {', '.join(write_bundle(args.path, args.monai_bundle, args.licence))}")
        return EXIT_OK
    from dinov2.checkpointer.export import export

    refuse_output(args.output, "output")
    count = export(args.path, args.output, args.chunks, not args.no_heads, args.licence)
    say(f"{args.output}: {count} tensors")
    return EXIT_OK


def _export_for_transformers(args: argparse.Namespace) -> int:
    from dinov2.sharing.transformers_folder import push, require_repository, write_folder

    if args.push:
        require_repository(args.push)
    names = write_folder(args.path, args.hf, args.licence)
    say(f"{args.hf}: {', '.join(names)}")
    if args.push:
        say(push(args.hf, args.push, names))
    return EXIT_OK


def _export_for_onnx(args: argparse.Namespace) -> int:
    from dinov2.sharing.onnx_file import write_onnx

    if args.size and len(args.size) not in (1, 3):
        raise BadInput("--size: give one number for a cube, or three (H W D, slice axis last)")
    size = triple(args.size if len(args.size) == 3 else args.size * 3) if args.size else None
    h, w, d = write_onnx(args.path, args.onnx, size, args.licence)
    say(f"{args.onnx}: pixel_values [batch, 1, {h}, {w}, {d}] -> pooler_output, patch_tokens")
    return EXIT_OK


def _datalist(args: argparse.Namespace) -> Datalist:
    from dinov2.data import read_datalist

    datalist = read_datalist(args.list)
    return datalist.larger_than(args.min_axis) if args.min_axis else datalist


def _first_line(command: Callable[[argparse.Namespace], int]) -> str:
    """What `--help` says of a command."""
    return (command.__doc__ or "").partition("\n")[0]


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("dinov2", description="Self-supervised pretraining of 3D vision transformers.")
    parser.add_argument("--version", action="version", version=f"dinov2-3d {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, what) in PROGRAMS.items():
        program = module.rpartition(".")[2]
        commands.add_parser(name, help=f"{what} (the flags of {program}.py; `dinov2 {name} --help`)", add_help=False)
    action = commands.add_parser("demo", help=_first_line(demo))
    action.add_argument("--output", type=Path, default=Path("demo_output"), help="folder of the results")
    action.add_argument("--data", type=Path, help="your own folder of volumes instead of made ones")
    action.add_argument("--seed", type=int, default=0)
    action.add_argument("--practice", type=Path, metavar="FOLDER", help="instead: write made heads there, to try commands on")
    action.add_argument("overrides", nargs="*", metavar="key=value", help="of the training's configuration")
    action.set_defaults(function=demo)
    action = commands.add_parser("doctor", help=_first_line(doctor))
    action.add_argument("--report", type=Path, help="write it to a file, for a bug report")
    action.set_defaults(function=doctor)
    action = commands.add_parser("watch", help=_first_line(watch))
    action.add_argument("folder", type=Path, metavar="OUT", help="--output-dir of a pretraining, running or not")
    action.add_argument("--once", action="store_true", help="show it once and end")
    action.set_defaults(function=watch)
    _add_config(commands)
    _add_cache(commands)
    _add_recipe(commands)
    _add_predict(commands)
    _add_classify(commands)
    commands.add_parser("split", help="write a downstream datalist of labelled cases: parts by patients", add_help=False)
    commands.add_parser("bench", help="time a configuration here: what holds it up, what a run will take", add_help=False)
    commands.add_parser("study", help="a comparison of methods: plan, run, status, collect, report", add_help=False)
    _add_corpus(commands)
    _add_embed(commands)
    _add_visualize(commands)
    _add_probe(commands)
    _add_retrieve(commands)
    _add_compare(commands)
    _add_figure(commands)
    _add_report(commands)
    _add_checkpoint(commands)
    return parser


def _add_config(commands: Commands) -> None:
    config = commands.add_parser("config", help="show or check a configuration").add_subparsers(required=True, metavar="ACTION")
    for name, function, required in (("show", config_show, False), ("check", config_check, True)):
        action = config.add_parser(name, help=_first_line(function))
        action.add_argument("config", nargs=None if required else "?", help="YAML file or name; default: the defaults")
        action.add_argument("overrides", nargs="*", metavar="key=value")
        action.set_defaults(function=function)


def _add_cache(commands: Commands) -> None:
    cache = commands.add_parser("cache", help="preprocessed volumes on disk").add_subparsers(required=True, metavar="ACTION")
    for name, function in (("build", cache_build), ("verify", cache_verify), ("stats", cache_stats)):
        action = cache.add_parser(name, help=_first_line(function))
        action.add_argument("list", type=Path, help="datalist (JSON)")
        action.add_argument("--cache-dir", type=Path, required=True, help="the cache folder")
        action.add_argument("--min-axis", type=int, default=0, help="only volumes with more voxels along their smallest axis")
        if name == "build":
            action.add_argument("--workers", type=int, help="processes; default: one per core; 0: this one")
            action.add_argument("--max-gb", type=float, help="stop growing at about this size (GiB)")
        if name == "verify":
            action.add_argument("--remove", action="store_true", help="remove damaged files, so that they are made anew")
        action.set_defaults(function=function)


def _add_recipe(commands: Commands) -> None:
    recipe = commands.add_parser("recipe", help="downstream datasets").add_subparsers(required=True, metavar="ACTION")
    action = recipe.add_parser("check", help=_first_line(recipe_check))
    action.add_argument("recipe", help="YAML file, or a name of configs/eval/datasets")
    action.add_argument("--base-data-dir", type=Path, required=True, help="folder of <dataset>_100_datalist.json")
    action.add_argument("--output-dir", type=Path, default=Path("recipe_check"), help="folder of the pictures")
    action.set_defaults(function=recipe_check)


def _add_checkpoint(commands: Commands) -> None:
    checkpoints = commands.add_parser("checkpoint", help="weights and training checkpoints in their forms")
    checkpoint = checkpoints.add_subparsers(required=True, metavar="ACTION")
    for name, function in (("inspect", checkpoint_inspect), ("export", checkpoint_export)):
        action = checkpoint.add_parser(name, help=_first_line(function))
        action.add_argument("path", type=Path, help="a file, a checkpoint's or run's folder, owner/name on the hub, or demo")
        if name == "export":
            action.add_argument("output", type=Path, nargs="?", help=".pth or .safetensors")
            action.add_argument("--hf", type=Path, metavar="DIR", help="a folder that transformers opens without this package")
            action.add_argument(
                "--onnx", type=Path, metavar="FILE", help="a file for ONNX runtimes: any batch, one size of volumes"
            )
            action.add_argument("--size", type=int, nargs="+", metavar="N", help="of these volumes: N, or H W D (voxels)")
            bundle = "a bundle of a trained segmentation (its best_model.pth), which MONAI runs"
            action.add_argument("--monai-bundle", type=Path, metavar="DIR", help=bundle)
            action.add_argument("--push", metavar="OWNER/NAME", help="put that folder on the Hugging Face hub")
            action.add_argument("--chunks", type=int, help="groups in the names of the blocks, 0: flat; default: as they are")
            action.add_argument("--no-heads", action="store_true", help="the backbone alone")
            action.add_argument(
                "--licence", metavar="TEXT", help="of the weights, as you decide; said whenever they are loaded"
            )
        action.set_defaults(function=function)


_ENCODER_HELP = "of what was trained on an encoder of your own (--model-name), whose code is then run"
_OTHERS_HELP = "the network that the weights are of, where it is not one of this package (docs/encoders.md); its code is run"


def _add_predict(commands: Commands) -> None:
    action = commands.add_parser("predict", help=_first_line(predict))
    action.add_argument("--weights", type=Path, required=True, help="best_model.pth of segmentation3d.py")
    files = "channels of one case, in the recipe's order, each a file or DICOM folder; or a folder of cases, as nnU-Net's"
    action.add_argument("--input", type=Path, nargs="+", required=True, metavar="FILE", help=files)
    action.add_argument("--output", type=Path, required=True, help=".nii.gz file; for a folder of cases a folder")
    action.add_argument("--overlap", type=float, default=0.75, help="share of a window that the next one covers too, 0 to 1")
    action.add_argument("--encoder", metavar="MODULE:FUNCTION", help=_ENCODER_HELP)
    action.set_defaults(function=predict)


def _add_classify(commands: Commands) -> None:
    action = commands.add_parser("classify", help=_first_line(classify))
    action.add_argument("--probe", type=Path, required=True, help="probe.pth of linear3d.py or of `dinov2 probe`")
    files = "scans, each a file or a DICOM folder; where the recipe has several channels, those of one case in its order"
    action.add_argument("--input", type=Path, nargs="+", required=True, metavar="FILE", help=files)
    action.add_argument("--output", type=Path, help="a table of the probabilities (CSV)")
    action.add_argument("--pretrained-weights", help="of the backbone, where they are no longer where they were")
    action.add_argument("--encoder", metavar="MODULE:FUNCTION", help=_ENCODER_HELP)
    action.set_defaults(function=classify)


def _add_probe(commands: Commands) -> None:
    action = commands.add_parser("probe", help=_first_line(probe))
    add = action.add_argument
    add("features", type=Path, metavar="FEATS", help="the table of `dinov2 embed` (.parquet)")
    add("--table", type=Path, required=True, metavar="PEOPLE", help="CSV or TSV file, a line a scan or person")
    add("--target", required=True, metavar="COLUMN", help="of that table: classes (words, a few whole numbers) or numbers")
    add("--output", type=Path, required=True, metavar="FOLDER", help="where everything is written")
    group = "whose each scan is; a person is never in two folds. Default: scans of one line, patient or BIDS subject"
    add("--group", metavar="COLUMN", help=group)
    covariates = "columns to compare with, and to add the features to; volume is measured where the table has none"
    add("--covariates", metavar="COLUMN,...", help=covariates)
    add(
        "--key",
        metavar="COLUMN",
        help="that names scans (path, id, file name, patient, sub-...); default: the one that joins most",
    )
    add("--task", choices=("classification", "regression"), help="default: by the target's values")
    parts = "class token, mean of the patch tokens, or both side by side; default: %(default)s"
    add("--features", dest="parts", default="cls+pooled", metavar="PART", help=f"cls, pooled or cls+pooled: {parts}")
    untrained = "tables of the same scans by `dinov2 embed --untrained SEED`, to compare with"
    add("--untrained", type=Path, nargs="+", default=[], metavar="FEATS", help=untrained)
    add("--folds", type=int, default=5, help="of the cross-validation; default: %(default)s")
    add("--repeats", type=int, default=5, help="of it, each with folds of its own; default: %(default)s")
    add("--seed", type=int, default=0, help="of the folds")
    add("--no-scans", action="store_true", help="do not read the scans to compare with their volume and histogram")
    action.set_defaults(function=probe)


def _add_compare(commands: Commands) -> None:
    action = commands.add_parser("compare", help=_first_line(compare))
    runs = "folders of finished runs, summary.json of nnU-Net, or CSV files with case,class,dice; names are those of folders"
    action.add_argument("runs", type=Path, nargs="+", metavar="RUN", help=runs)
    action.add_argument(
        "--output", type=Path, metavar="FOLDER", help="where comparison.csv, comparison.json and figures are written"
    )
    action.add_argument("--no-figures", action="store_true", help="only the numbers")
    action.set_defaults(function=compare)


def _add_figure(commands: Commands) -> None:
    figures = commands.add_parser("figure", help="figures of what is no study").add_subparsers(required=True, metavar="ACTION")
    for name, function in (("corpus", figure_corpus), ("octants", figure_octants)):
        action = figures.add_parser(name, help=_first_line(function))
        if name == "corpus":
            action.add_argument("list", type=Path, help="datalist (JSON), as of `dinov2 index`")
        else:
            action.add_argument("--points", type=int, choices=range(1, 9), default=4, help="of each head")
        action.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="where PNG, PDF and CSV are written")
        action.set_defaults(function=function)


def _add_report(commands: Commands) -> None:
    action = commands.add_parser("report", help=_first_line(report))
    folders = "output folder of a pretraining, segmentation, linear, knn, logistic, ridge or probe run, or of a study"
    action.add_argument("folder", type=Path, metavar="OUT", help=folders)
    action.add_argument("--output", type=Path, metavar="FILE", help="page (.html); default: report.html in the folder")
    scan = "of a pretraining: the scan whose features are shown through the checkpoints; default: one of its list"
    action.add_argument("--scan", type=Path, help=scan)
    left_out = "of a pretraining: without crops, masks and features, which need its data and networks"
    action.add_argument("--no-examples", action="store_true", help=left_out)
    action.set_defaults(function=report)


def _add_corpus(commands: Commands) -> None:
    action = commands.add_parser("index", help=_first_line(index))
    action.add_argument(
        "folders", type=Path, nargs="+", metavar="FOLDER", help="folders of volumes; with --merge: shards' lists"
    )
    action.add_argument("--output", type=Path, required=True, help="datalist to write; what was seen is kept beside it")
    action.add_argument("--quarantine", type=Path, help="what was set aside; default: beside the list")
    action.add_argument("--report", type=Path, help="an HTML page of what is in the list")
    action.add_argument("--min-axis", type=int, default=8, help="fewest voxels along the smallest axis")
    action.add_argument("--max-nan", type=float, default=0.0, help="share of voxels that may be NaN or infinite")
    action.add_argument(
        "--pattern", help="what the folders' names are: '{dataset}/{patient}/*_{modality}.nii.gz'; also {organ}"
    )
    action.add_argument("--fourth-axis", choices=("time", "channels", "refuse"), default="refuse", help="where no header says")
    action.add_argument("--spacing", type=float, nargs=3, metavar="MM", help="of files that have none (NumPy)")
    action.add_argument("--keep-ids", action="store_true", help="patients' ids as they are, instead of their hashes")
    salt = "secret word of the hashes, the same for lists that are to be compared; default: a random one, kept beside the list"
    action.add_argument("--id-salt", default="", help=salt)
    action.add_argument("--workers", type=int, help="processes; default: one per core; 0: this one")
    action.add_argument("--shard", default="1/1", metavar="I/N", help="only the I-th of N parts")
    action.add_argument("--merge", action="store_true", help="write one list of several shards'")
    action.set_defaults(function=index)
    action = commands.add_parser("curate", help=_first_line(curate))
    action.add_argument("list", type=Path, help="datalist (JSON)")
    action.add_argument("--rules", required=True, help="YAML file or name; pretrain/curation/paper: the paper's")
    action.add_argument("--output", type=Path, required=True, help="datalist to write")
    action.add_argument("--explain", action="store_true", help="print what each rule kept")
    action.set_defaults(function=curate)
    action = commands.add_parser("overlap", help=_first_line(overlap))
    action.add_argument("first", type=Path, help="datalist (JSON)")
    action.add_argument(
        "second", type=Path, help="datalist, or weights (as of embed) that carry the hashes of their training scans"
    )
    action.set_defaults(function=overlap)


def _add_embed(commands: Commands) -> None:
    action = commands.add_parser("embed", help=_first_line(embed))
    action.add_argument("source", type=Path, metavar="LIST|FOLDER", help="datalist (JSON), or a folder, which is indexed first")
    action.add_argument(
        "--weights",
        required=True,
        help="file, checkpoint's or run's folder, owner/name on the Hugging Face hub, demo, or a network's name",
    )
    action.add_argument("--output", type=Path, required=True, help="the table (.parquet); its other files lie beside it")
    action.add_argument("--config-file", help="of the network, for weights that do not tell")
    action.add_argument("--encoder", metavar="MODULE:FUNCTION", help=_OTHERS_HELP)
    untrained = "the network of these weights with random ones instead, for comparison (`dinov2 probe --untrained`)"
    action.add_argument("--untrained", type=int, metavar="SEED", help=untrained)
    action.add_argument("--mode", default="full_image", help="full_image, resize or sliding_window")
    action.add_argument("--size", type=int, help="edge of resize and of windows (voxels); default: that of pretraining")
    action.add_argument("--overlap", type=float, default=0.5, help="of windows")
    spacing = "native (default), or mm that scans are brought to first: one number, or three (in the slice twice, across)"
    action.add_argument("--spacing", default="native", metavar="MM|MM,MM,MM", help=spacing)
    action.add_argument("--patch-tokens", action="store_true", help="write them too, a .npz a scan with the grid's affine")
    action.add_argument("--layers", type=int, default=1, help="last layers whose patch tokens are written")
    action.add_argument("--batch-size", type=int, default=8, help="windows, or channels of a scan, per pass")
    action.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    action.add_argument("--dtype", default="auto", help="of matrix products: auto, fp32, bf16, fp16")
    action.add_argument("--workers", type=int, help="processes that load; default: one per core; 0: this one")
    action.add_argument("--shard", default="1/1", metavar="I/N", help="one of N shares; the last to end writes the table")
    action.set_defaults(function=embed)


def _add_visualize(commands: Commands) -> None:
    action = commands.add_parser("visualize", help=_first_line(visualize))
    files = "a file or DICOM folder; several: the channels of one scan"
    action.add_argument("scan", type=Path, nargs="+", metavar="SCAN", help=files)
    action.add_argument("--weights", required=True, help="as of embed")
    action.add_argument("--type", choices=("pca", "attention", "similarity"), default="pca", help="default: pca")
    action.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="of pictures and NIfTI files")
    joint = "further scans: with pca one basis for all, with similarity where the place is in them"
    action.add_argument("--joint", type=Path, nargs="+", default=[], metavar="SCAN", help=joint)
    at = "a place in the first scan's world (mm): similarity to it, attention of its patch, planes of pca through it"
    action.add_argument("--at", type=float, nargs=3, metavar=("X", "Y", "Z"), help=at)
    modes = "full_image, resize, sliding_window; default: windows where the whole is more than 4,096 patches"
    action.add_argument("--input-type", choices=("auto", "full_image", "resize", "sliding_window"), default="auto", help=modes)
    action.add_argument("--size", type=int, help="edge of resize and of windows (voxels); default: that of pretraining")
    action.add_argument("--overlap", type=float, default=0.5, help="of windows")
    step = "voxels between tokens, a divisor of the patch: finer pictures, (patch / step)^3 times the work"
    action.add_argument("--step", type=int, help=step)
    action.add_argument("--viewer", action="store_true", help="write viewer.html too: open it in a browser, click a place")
    action.add_argument("--layer", type=int, default=-1, help="whose attention; default: the last")
    action.add_argument("--interpolation", choices=("linear", "nearest"), default="linear", help="between patches")
    action.add_argument("--fourth-axis", choices=("time", "channels", "refuse"), default="refuse", help="where no header says")
    action.add_argument("--config-file", help="of the network, for weights that do not tell")
    action.add_argument("--encoder", metavar="MODULE:FUNCTION", help=_OTHERS_HELP)
    action.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    action.add_argument("--dtype", default="auto", help="of matrix products: auto, fp32, bf16, fp16")
    action.set_defaults(function=visualize)


def _add_retrieve(commands: Commands) -> None:
    action = commands.add_parser("retrieve", help=_first_line(retrieve))
    action.add_argument("table", type=Path, metavar="FEATS", help="table of `dinov2 embed` (.parquet)")
    query = "a row of the table (its number from 0, path or id), or another scan, which is embedded as the table's were"
    action.add_argument("--query", required=True, metavar="SCAN|ROW", help=query)
    place = "look for this place of the query's world (mm, RAS+) in other scans; the table needs --patch-tokens"
    action.add_argument("--at", type=float, nargs=3, metavar=("X", "Y", "Z"), help=place)
    action.add_argument("-k", type=int, default=5, help="number of hits")
    action.add_argument(
        "--where", nargs="+", action="extend", default=[], metavar="COLUMN=VALUE", help="only scans with these; modality=CT"
    )
    same = "only scans of another value than the query's; patient"
    action.add_argument("--exclude-same", nargs="+", action="extend", default=[], metavar="COLUMN", help=same)
    action.add_argument("--features", choices=("cls", "pooled"), default="cls", help="what whole scans are compared by")
    action.add_argument("--output", type=Path, required=True, help="page (.html); a CSV file is written beside it")
    action.add_argument("--weights", help="to embed the query with, as of embed; default: what the table names")
    action.add_argument("--config-file", help="of the network, for weights that do not tell")
    action.add_argument("--device", default="auto", help="for embedding the query: auto, cpu, cuda, ...")
    action.add_argument("--base-data-dir", type=Path, help="where the table's paths begin; default: as the table says")
    action.set_defaults(function=retrieve)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a sub-command; a user's mistake is one line and exit code 2."""
    setup_logging()
    try:
        try:
            code = _run(argv)
        except SystemExit:  # of --help, which may still have to be written
            sys.stdout.flush()
            raise
        sys.stdout.flush()  # here, where a reader that has gone can be told from a full disk
        return code
    except BrokenPipeError:  # `dinov2 ... | head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python flushes when it ends
        return EXIT_PIPE
    except BadInput as err:
        logger.error("%s", err)
    except ImportError as err:  # of what a command's modules begin with
        line = missing_line(err, "this command")
        if line is None:
            raise
        logger.error("%s", line)
    except OSError as err:  # a full disk, a folder that went away, a name that a system cannot have
        logger.error("%s: %s", shown(err.filename or "a file"), err.strerror or err)
    return EXIT_BAD_INPUT


def _run(argv: Sequence[str] | None) -> int:
    argv = words(argv)
    if argv and argv[0] in PROGRAMS:
        module, _ = PROGRAMS[argv[0]]
        return importlib.import_module(module).main(argv[1:])
    if argv[:1] == ["split"]:
        from dinov2.data.downstream.split_command import main as split_main

        return split_main(argv[1:], say)
    if argv[:1] == ["study"]:
        from dinov2.eval.study.command import main as study_main

        return study_main(argv[1:], say)
    if argv[:1] == ["bench"]:
        from dinov2.bench.command import main as bench_main

        return bench_main(argv[1:], say)
    args = build_parser().parse_args(argv)
    return args.function(args)

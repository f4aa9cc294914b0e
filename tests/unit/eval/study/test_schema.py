"""A study's file is as strict as a configuration, and its levels of budget come over each other."""

from __future__ import annotations

import dataclasses
import re
import time
from pathlib import Path

import pytest

from dinov2.configs import ConfigError
from dinov2.errors import EXIT_BAD_INPUT, EXIT_OK
from dinov2.eval.methods import registry
from dinov2.eval.study.cells import cells_of, labelled_sets, method_settings
from dinov2.eval.study.plan import plan, weights_problem
from dinov2.eval.study.schema import Dataset, Method, Study, load_study
from dinov2.models import swin

MINIMAL = "datasets: {BTCV: {percents: [25, 100]}}\nmethods: {3DINO: {weights: random}, Random: }\n"
PAPER = ("paper_segmentation", "paper_classification", "paper_linear_decoder", "paper_ood")


@pytest.mark.parametrize(
    "text, words",
    [
        ("bugdet: {epochs: 1}", ["'bugdet'", "did you mean 'budget'"]),
        ("budget: {epoch: 1}", ["'budget.epoch'", "did you mean", "epochs"]),
        ("methods: {A: {weigths: x}}", ["methods.A.weigths", "weights"]),
        ("methods: {A: {budget: {epoch: 1}}}", ["methods.A.budget.epoch", "epochs"]),
        ("methods: {A: {by_dataset: {BTVC: {epochs: 1}}}}", ["methods.A", "'BTVC'", "'BTCV'"]),
        ("methods: {A: {datasets: [BTVC]}}", ["methods.A", "'BTVC'", "'BTCV'"]),
        ("methods: {a/b: }", ["'a/b'", "folder"]),
        ("methods: [A]", ["methods", "list"]),
        ("datasets: {BTCV: {percents: [0]}}", ["percents=[0]", "above 0"]),
        ("datasets: {BTCV: {percents: [25, 25]}}", ["each once"]),
        ("datasets: {BTCV: {percents: [few]}}", ["percents"]),
        ("seeds: []", ["seeds=[]"]),
        ("budget: {epochs: 0}", ["epochs=0"]),
        ("budget: {flags: {output-dir: x}}", ["flags.output-dir", "leave it out"]),
        ("budget: {flags: {opts: {a: 1}}}", ["flags.opts", "a list of words"]),
        ("subject: Nobody", ["subject='Nobody'"]),
        ("paper: segmentatoin", ["paper='segmentatoin'", "did you mean 'segmentation'"]),
    ],
)
def test_a_study_that_cannot_be_used_is_refused_in_one_line(tmp_path: Path, text: str, words: list[str]) -> None:
    (tmp_path / "base.yaml").write_text(MINIMAL)
    (tmp_path / "s.yaml").write_text(f"base: {tmp_path / 'base.yaml'}\n{text}\n")
    with pytest.raises(ConfigError) as err:
        load_study(tmp_path / "s.yaml")
    message = str(err.value)
    assert "\n" not in message and "s.yaml" in message
    for word in words:
        assert word in message


def test_a_study_without_methods_or_data_sets_and_one_that_is_not_there_are_refused(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text("seeds: [0]\n")
    with pytest.raises(ConfigError, match="datasets is empty: name one"):
        load_study(tmp_path / "s.yaml")
    with pytest.raises(ConfigError, match="methods is empty: name one"):
        load_study(tmp_path / "s.yaml", ["datasets={BTCV: {}}"])
    with pytest.raises(ConfigError, match="no study of that name .did you mean 'paper_ood'"):
        load_study("paper_odd")


def test_the_budget_of_a_cell_is_that_of_its_nearest_level(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(
        "base_data_dir: DATA\n"
        "budget: {epochs: 1, epoch_length: 1, batch_size: 1, image_size: 1, flags: {a: 1, b_c: 1, d: true}}\n"
        "datasets: {BTCV: {budget: {epoch_length: 2, batch_size: 2, image_size: 2, flags: {b_c: 2}}}, BraTS: }\n"
        "methods: {3DINO: {weights: w, head: Linear, budget: {batch_size: 3, image_size: 3},"
        " by_dataset: {BTCV: {image_size: 4, flags: {opts: [x=1, y=2]}}}}, UNet: }\n"
    )
    study = load_study(tmp_path / "s.yaml", ["budget.epochs=7"])
    by_name = {cell.name: cell for cell in cells_of(study, labelled_sets(study))}
    assert list(by_name) == ["BTCV/3DINO/100/0", "BTCV/UNet/100/0", "BraTS/3DINO/100/0", "BraTS/UNet/100/0"]
    words = by_name["BTCV/3DINO/100/0"].command()
    assert words[0] == "segment"
    line = " ".join(words)
    for part in (
        "--model-name 3DINO --pretrained-weights w --segmentation-head Linear", "--epochs 7 ", "--epoch-length 2 ",
        "--batch-size 3 ", "--image-size 4 ", "--a 1 --b-c 2 --d --opts x=1 y=2", "--dataset-percent 100 --dataset-seed 0",
        "--output-dir studies/s/cells/BTCV/3DINO/100/0 --cache-dir studies/s/cache", "--base-data-dir DATA",
    ):  # fmt: skip
        assert part in line, part
    assert "--warmup-iters" not in line and "--num-workers" not in line  # the program's own defaults
    other = " ".join(by_name["BraTS/UNet/100/0"].command())
    assert "--model-name UNet --pretrained-weights random --epochs 7 --epoch-length 1" in other
    assert "--segmentation-head" not in other


def test_flags_are_those_of_the_programs(study: Study) -> None:
    """What cells say is parsed by the programs' own parsers."""
    from dinov2.eval import linear3d, segmentation3d

    parsers = {"segment": segmentation3d.get_args_parser(), "linear": linear3d.get_args_parser()}
    cells = cells_of(study, labelled_sets(study))
    cells += [c for name in PAPER for s in [load_study(name)] for c in cells_of(s, labelled_sets(s))]
    for cell in cells:
        program, *words = cell.command()
        args = parsers[program].parse_intermixed_args(words)
        assert (args.dataset_percent, args.dataset_seed, args.model_name) == (cell.percent, cell.seed, cell.method)


@pytest.mark.parametrize("name", [*PAPER, "mini", "smoke"])
def test_a_plan_lists_every_cell_and_what_is_missing_before_anything_runs(name: str, tmp_path: Path) -> None:
    study = load_study(name, [f"output_dir={tmp_path / 'out'}"])
    lines: list[str] = []
    began = time.perf_counter()
    assert plan(study, lines.append) == EXIT_BAD_INPUT  # lists and weights are missing
    assert time.perf_counter() - began < 5
    cells = [cell.name for cell in cells_of(study, labelled_sets(study))]
    rows = [line.split() for line in lines[2 : 2 + len(cells)]]
    assert [row[0] for row in rows] == cells
    assert all(re.fullmatch(r"[~>]?[\d.]+", row[3]) for row in rows)
    for dataset in study.datasets:
        assert any(line.startswith(f"problem: {dataset}: no base_data_dir") for line in lines)
    if name in PAPER:
        assert any(line.startswith("problem: methods.3DINO.weights: this method needs some") for line in lines)
        assert {row[2] for row in rows} == {"12,500" if name == "paper_classification" else "30,000"}
    assert not (tmp_path / "out").exists()


def test_the_paper_studies_have_the_papers_percents_seeds_and_methods() -> None:
    percents = {n: {d: s.dataset(d).percents for d in s.datasets} for n in PAPER for s in [load_study(n)]}
    assert percents["paper_segmentation"] == {"BraTS": [10, 100], "BTCV": [25, 100]}
    assert percents["paper_ood"] == {"LA-SEG": [5, 10, 25, 100], "TDSC-ABUS": [25, 100]}
    assert percents["paper_classification"] == {d: [25, 50, 75, 100] for d in ("ICBM", "COVID-CT-MD")}
    assert [len(load_study(n).seeds) for n in PAPER] == [1, 5, 1, 1]
    assert list(load_study("paper_linear_decoder").methods) == ["3DINO", "MONAI-ViT", "Random"]
    segmentation = load_study("paper_segmentation")
    assert list(segmentation.methods) == ["3DINO", "Random", "SwinRandom", "SwinTransfer", "MONAI-ViT"]
    assert [segmentation.budget_of("SwinRandom", d).batch_size for d in ("BraTS", "BTCV")] == [1, 2]
    smoke = load_study("smoke", ["methods.SwinTransfer.weights=w.pt"])
    assert len(smoke.methods) == 6 and len(smoke.datasets) == len(smoke.seeds) == 2
    mini = load_study("mini")
    counts = [round(145 * p / 100) for p in mini.dataset("MSD-Hippocampus").shares]
    assert counts == [1, 5, 20, 145] and len(mini.seeds_of("MSD-Hippocampus")) == 3 and len(mini.seeds_of("brain_t1_sex")) == 5
    assert [segmentation.budget_of(m, "BTCV").image_size for m in segmentation.methods] == [112, 112, 96, 96, 96]


def test_a_data_set_may_have_seeds_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text("seeds: [4]\ndatasets: {BTCV: , ICBM: {seeds: [0, 7]}}\nmethods: {Random: }\n")
    study = load_study(tmp_path / "s.yaml")
    assert [c.name for c in cells_of(study, labelled_sets(study))] == [
        "BTCV/Random/100/4", "ICBM/Random/100/0", "ICBM/Random/100/7",
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="seeds=.7, 7. must be some, each once"):
        load_study(tmp_path / "s.yaml", ["datasets.ICBM.seeds=[7,7]"])


def test_a_plan_says_which_methods_cannot_be_run_so(study_file: Path) -> None:
    """What the programs would refuse once the cells run, as far as it is known before their weights are opened."""
    methods = (
        "methods={SwinRandom: {budget: {image_size: %d}}, UNet: {head: Linear, datasets: [balls]}, Random: {head: Linear}}"
    )
    words = {edge: [methods % edge] for edge in (32, 40, 64)}
    lines: list[str] = []
    assert plan(load_study(study_file, words[32]), lines.append) == EXIT_BAD_INPUT
    problems = [line for line in lines if line.startswith("problem: ")]
    assert [p.split(": ")[1] for p in problems] == ["SwinRandom on balls", "UNet on balls", "SwinRandom on ages"]
    for problem, part in zip(problems, ("makes one voxel of SwinUNETR", "UNet has DynUNet", "no feature for a"), strict=True):
        assert part in problem
    for edge, says in ((40, "no multiple of SwinUNETR's stride 32: use [32, 64]"), (64, "")):
        study = load_study(study_file, words[edge])
        cell = next(c for c in cells_of(study, labelled_sets(study)) if c.method == "SwinRandom")
        assert says in cell.misfit and bool(says) == bool(cell.misfit)
    assert registry.SWIN_STRIDE == swin.SMALLEST


def test_weights_are_looked_for_without_being_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()
    (tmp_path / "runs").mkdir()
    (tmp_path / "w.pth").touch()
    for there in ("w.pth", "runs", "random", "demo", "vit_small_3d", "owner/name", "owner/name@main:file.pt"):
        assert not weights_problem(there), there
    for missing in ("none.pth", "owner/none.pth", "runs/none", "none"):
        assert weights_problem(missing) == f"{missing}: no such file or folder"
    settings = {
        name: method_settings("3DINO", Method(weights=name), "segmentation") for name in ("w.pth", "demo", "owner/name")
    }
    assert [s["pretrained-weights"] for s in settings.values()] == [str(tmp_path / "w.pth"), "demo", "owner/name"]


def test_subsets_are_the_programs_own_and_the_same_for_all_methods(study: Study) -> None:
    """Of a segmentation the list's first cases for every seed, of a classification a draw of each seed."""
    sets = labelled_sets(dataclasses.replace(study, datasets={**study.datasets, "ages": Dataset(study.dataset("ages").recipe)}))
    for name, is_drawn in (("balls", False), ("ages", True)):
        parts = [sets[name].parts(50, seed) for seed in (0, 1)]
        assert (parts[0]["training"] != parts[1]["training"]) == is_drawn
        assert parts[0]["test"] == parts[1]["test"] and parts[0]["training"].count == len(sets[name].splits["training"]) // 2
    by_cell = {cell.name: cell.parts for cell in cells_of(study, labelled_sets(study))}
    for name, found in by_cell.items():
        assert found == by_cell[name.replace("Random", "3DINO")]


def test_a_plan_says_where_the_disk_is_too_small(study: Study) -> None:
    lines: list[str] = []
    assert plan(study, lines.append) == EXIT_OK and not [line for line in lines if "problem" in line]
    huge = dataclasses.replace(study, budget=dataclasses.replace(study.budget, disk_gib=1e9))
    assert plan(huge, lines.append) == EXIT_BAD_INPUT
    assert "GiB free, 12 cells may leave 12,000,000,000" in lines[-1] and "make room" in lines[-1]

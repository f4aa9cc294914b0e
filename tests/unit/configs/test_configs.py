"""Configuration: one source of keys, strict, explained."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from dinov2.cli import main
from dinov2.configs import ConfigError, config_keys, default_yaml, find_config, load_and_merge_config_3d

ROOT = Path(__file__).resolve().parents[3]
LISTS = [p for p in (ROOT / "configs").rglob("*.yaml") if re.search(r"^(stages|rules):", p.read_text(), re.M)]
OTHERS = ROOT / "configs" / "eval"  # of other schemas: tests/unit/data/downstream/test_recipes.py, tests/unit/eval/study
FOLDERS = (ROOT / "configs", ROOT / "dinov2" / "configs")
ALL_YAML = sorted(p for folder in FOLDERS for p in folder.rglob("*.yaml") if p not in LISTS and OTHERS not in p.parents)
# kept so that old files load; said once in the log (train3d.say_what_has_no_effect), or read by fsdp only
ACCEPTED_ONLY = {"sharding_strategy", "reduce_dtype", "buffer_dtype"}


@pytest.mark.parametrize("path", ALL_YAML, ids=lambda p: p.stem)
def test_every_yaml_file_loads(path: Path) -> None:
    load_and_merge_config_3d(path)


def test_the_default_file_is_the_schema() -> None:
    text = find_config("ssl3d_default_config").read_text()
    assert text.split("\n", 1)[1] == default_yaml(), "regenerate it: dinov2 config show"
    assert load_and_merge_config_3d("ssl3d_default_config") == load_and_merge_config_3d()


def test_every_key_has_a_meaning_and_is_read_by_code() -> None:
    code = "\n".join(p.read_text() for p in (ROOT / "dinov2").rglob("*.py") if p.name != "schema.py")
    model_args = (ROOT / "dinov2/data/augmentations.py").read_text()  # takes all of `crops` by name
    for key, field in config_keys():
        leaf = key.rsplit(".", 1)[-1]
        assert field.metadata["meaning"], key
        assert leaf in ACCEPTED_ONLY or re.search(rf"\.{leaf}\b|\"{leaf}\"|\b{leaf}=", code) or leaf in model_args, key


@pytest.mark.parametrize(
    "override, words",
    [
        ("train.sed=3", ["command line", "'train.sed'", "did you mean 'train.seed'"]),
        ("seed=3", ["'seed'", "'train.seed'"]),
        ("traim.seed=3", ["'traim'", "did you mean 'train'"]),
        ("train.seed=abc", ["train.seed", "abc", "Integer"]),
        ("train.seed=1.5", ["train.seed", "1.5"]),
        ("train.seed", ["key=value"]),
        ("train=3", ["section"]),
        ("train=[3]", ["command line", "train", "needs keys and values"]),
        ("crops.rotate_range.x=3", ["crops.rotate_range", "{'x': 3}"]),
        ("crops.global_crops_in_slice_scale.x=3", ["crops.global_crops_in_slice_scale", "['x']", "needs a list"]),
        ("crops.global_crops_in_slice_scale={}", ["crops.global_crops_in_slice_scale", "needs a list"]),
        ("[=", ["'['", "joined by dots"]),
        ("train.seed[=3", ["'train.seed['", "joined by dots"]),
        ("train[seed]=3", ["joined by dots"]),
        ("train\\.seed=3", ["joined by dots"]),
        ("student.arch=vit_larg", ["vit_large_3d", "did you mean"]),
        ("crops.global_crops_size=90", ["crops.global_crops_size=90", "patch_size=16", "use 80 or 96"]),
        ("crops.local_crops_size=8", ["use 16"]),
        ("crops.turn_p=1.5", ["crops.turn_p=1.5", "[0, 1]"]),
        ("crops.rotate_range=-0.1", ["crops.rotate_range=-0.1", "[0, pi / 2]"]),
        ("crops.sharpen_alpha=[3,1]", ["crops.sharpen_alpha=[3", "low <= high"]),
        ("crops.global_crops_in_slice_scale=[0.9,0.5]", ["crops.global_crops_in_slice_scale", "low <= high"]),
        ("ibot.mask_ratio_min_max=[0.5]", ["ibot.mask_ratio_min_max"]),
        ("student.depth=5", ["block_chunks=4", "use 0"]),
        ("student.num_heads=7", ["embed_dim=1024", "num_heads=7"]),
        ("train.centering=none", ["sinkhorn_knopp"]),
        ("optim.scaling_rule=sqrt", ["sqrt_wrt_1024"]),
        ("compute_precision.student.backbone.mixed_precision.param_dtype=half", ["fp16"]),
        ("compute_precision.student.backbone.mixed_precision.param_dtype=fp64", ["fp64", "all six"]),
        ("train.strategy=None", ["train.strategy='None'", "auto"]),
        ("optim.scaling_rule=None", ["optim.scaling_rule='None'", "none"]),
        ("evaluation.tasks=[{knd: knn}]", ["evaluation.tasks", "unknown key 'knd'", "did you mean 'kind'"]),
        ("evaluation.tasks=[{kind: knn, dataset: a, base_data_dir: b, size: x}]", ["evaluation.tasks: size", "'x'"]),
        ("evaluation.tasks=[{kind: knn, dataset: a}]", ["evaluation.tasks", "has no base_data_dir"]),
        ("evaluation.tasks={kind: knn}", ["evaluation.tasks", "needs a list"]),
        ("train.seed=${nowhere}", ["train.seed", "nowhere"]),
    ],
)
def test_a_wrong_key_or_value_is_explained_in_one_line(override: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as err:
        load_and_merge_config_3d("ssl3d_default_config", [override])
    message = str(err.value)
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize("base", ["{a: 1}", "[1]", "1", "''", ".", '"a\\0b"', "${x}", "a" * 300, "tiny_cup"])
def test_a_base_that_none_is_is_named_with_its_file(base: str, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(f"base: {base}\n")
    with pytest.raises(ConfigError, match=r"a.yaml: base: .*no.* configuration") as err:
        load_and_merge_config_3d(tmp_path / "a.yaml")
    assert len(str(err.value).splitlines()) == 1


@pytest.mark.parametrize("nothing", ["", "null", "None"])
def test_nothing_is_null_or_the_default(nothing: str, tmp_path: Path) -> None:
    (tmp_path / "old.yaml").write_text(
        "MODEL: {WEIGHTS: None}\ntrain: {cache_dir: None, output_dir: None, seed: 4}\nteacher:\n"
        "student: {pretrained_weights: None, layerscale: 0.1}\noptim: {lr: 0.0014}\ncrops: {sharpen_alpha: [1, 2]}\n"
    )
    keys = ("optim.lr", "student.layerscale", "train.num_threads", "crops.sharpen_alpha", "train.cache_dir", "teacher")
    cfg = load_and_merge_config_3d(tmp_path / "old.yaml", [f"{key}={nothing}" for key in keys])
    assert (cfg.MODEL.WEIGHTS, cfg.train.cache_dir, cfg.student.pretrained_weights) == ("", "", "")  # no folder named None
    assert (cfg.train.output_dir, cfg.train.seed) == ("./output_test", 4)
    assert (cfg.optim.lr, cfg.crops.sharpen_alpha) == (0.0, [10, 30])
    assert (cfg.student.layerscale, cfg.train.num_threads) == (None, None)  # these can be null themselves
    assert cfg.teacher == load_and_merge_config_3d().teacher


def test_two_start_weights_are_refused() -> None:
    with pytest.raises(ConfigError, match="keep one"):
        load_and_merge_config_3d(None, ["student.pretrained_weights=a", "student.full_pretrained_weights=b"])


@pytest.mark.parametrize(
    "text, words", [("a: [1", "not a readable YAML"), ("- 1\n", "holds a list"), ("x: 1", "unknown key 'x'")]
)
def test_an_ill_formed_file_is_named(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=words) as err:
        load_and_merge_config_3d(path)
    assert str(path) in str(err.value)


def test_a_name_is_looked_up_after_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_and_merge_config_3d("pretrain/tiny_cpu").student.embed_dim == 96
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pretrain").mkdir()
    (tmp_path / "pretrain" / "tiny_cpu").write_text("train: {seed: 17}\n")
    assert load_and_merge_config_3d("pretrain/tiny_cpu").train.seed == 17
    with pytest.raises(ConfigError, match="did you mean 'pretrain/tiny_cpu'"):
        load_and_merge_config_3d("pretrain/tiny_cpo")


def test_a_file_can_begin_from_another_one(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("base: train/vit3d_highres\ntrain: {seed: 4}\n")
    cfg = load_and_merge_config_3d(tmp_path / "mine.yaml", ["crops.local_crops_size=32"])
    assert (cfg.train.seed, cfg.crops.global_crops_size, cfg.crops.local_crops_size) == (4, 112, 32)
    assert load_and_merge_config_3d("pretrain/vit_large_highres") == load_and_merge_config_3d("train/vit3d_highres")
    (tmp_path / "loop.yaml").write_text(f"base: {tmp_path / 'loop.yaml'}\n")
    with pytest.raises(ConfigError, match="leads back"):
        load_and_merge_config_3d(tmp_path / "loop.yaml")


def test_a_built_configuration_cannot_be_edited() -> None:
    cfg = load_and_merge_config_3d()
    with pytest.raises(Exception, match="read-only"):
        cfg.train.seed = 3


def test_what_show_prints_loads_as_the_same_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "show", "pretrain/tiny_cpu", "train.seed=5"]) == 0
    (tmp_path / "shown.yaml").write_text(capsys.readouterr().out)
    shown, built = (
        load_and_merge_config_3d(tmp_path / "shown.yaml"),
        load_and_merge_config_3d("pretrain/tiny_cpu", ["train.seed=5"]),
    )
    assert OmegaConf.to_container(shown) == OmegaConf.to_container(built)


def test_check_says_what_is_wrong_and_exits_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "check", "pretrain/tiny_cpu"]) == 0
    assert main(["config", "check", "pretrain/tiny_cpu", "train.sed=1"]) == 2
    assert "did you mean 'train.seed'" in capsys.readouterr().err

"""Which network a segmentation keeps as its best one."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dinov2.configs import load_and_merge_config_3d
from dinov2.data.downstream.cases import Case
from dinov2.data.downstream.recipes import Recipe
from dinov2.distributed.runtime import Runtime
from dinov2.eval.metrics.segmentation import Score
from dinov2.eval.probing.choice import choose
from dinov2.eval.segmentation_3d import engine
from dinov2.visual import cases

NAN = math.nan


@pytest.mark.parametrize(
    "scores, kept",
    [
        ([0.2, 0.1, 0.3], [0, 2]),
        ([NAN, 0.1, NAN, 0.2, 0.2], [0, 1, 3]),  # no class of the validation part counted at first
        ([NAN, NAN, 0.0], [0, 1, 2]),  # the newest, while nothing tells them apart
        ([0.2, NAN, 0.1], [0]),
    ],
)
def test_the_best_network_is_kept_whatever_the_first_validation_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scores: list[float], kept: list[int]
) -> None:
    saved: list[int] = []
    model = torch.nn.Linear(1, 1)
    recipe = Recipe(classes={0: "background", 1: "organ"})
    task = SimpleNamespace(recipe=recipe, image_size=16)
    measures = {"dice": NAN}
    optimizer = torch.optim.AdamW(model.parameters())
    run = engine.Run(model, optimizer, torch.amp.GradScaler("cpu", enabled=False), tmp_path)
    monkeypatch.setattr(engine, "score_cases", lambda *_, **__: ([], 0.0))
    monkeypatch.setattr(engine, "predict_masks", lambda *_, **__: None)
    monkeypatch.setattr(engine, "as_predicted", lambda *_, **__: None)
    monkeypatch.setattr(engine, "draw_prepared", lambda *_, **__: None)
    monkeypatch.setattr(engine, "save_segmentation", lambda *_, **__: saved.append(run.iteration))
    metrics = SimpleNamespace(write_image=lambda *_: None)
    for i, score in enumerate(scores):
        mean = {"mean": {"dice": score}, "per_class": {"organ": measures}}
        monkeypatch.setattr(engine, "summarise", lambda *_, mean=mean, **__: mean)
        run.iteration = i
        engine.validate(
            run, load_and_merge_config_3d(), task, [SimpleNamespace(name="a")], 0.5, metrics, Runtime(torch.device("cpu"))
        )
        run.save()
        run = engine.Run(model, optimizer, run.scaler, tmp_path)  # as a resume finds it
        run.resume()
    assert saved == kept


def test_the_worst_cases_are_drawn_with_their_dice_in_the_planes_of_the_truth(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: dict[str, tuple[str, tuple[int, ...] | None]] = {}
    monkeypatch.setattr(cases, "draw_case", lambda _, __, ___, path, title, at: drawn.update({path.name: (title, at)}))
    predicted = torch.zeros(2, 5, 4, 3, dtype=torch.bool)
    predicted[1, 0, 0, 0] = True
    monkeypatch.setattr(engine, "predict_masks", lambda *_: predicted)
    label = torch.zeros(1, 5, 4, 3)
    label[0, 3, 2, 1] = 1
    items = [SimpleNamespace(case=name) for name in ("good", "sub/bad", "none")]
    case = Case(items[1], torch.zeros(1, 5, 4, 3), label, SimpleNamespace(spacing_mm=(1.0, 1.0, 2.0)))
    scores = [Score("good", "organ", 0.9, *[NAN] * 4, True, True), Score("sub/bad", "organ", 0.25, *[NAN] * 4, True, True)]
    scores += [Score(name, "background", 0.1, *[NAN] * 4, True, True) for name in ("good", "none")]
    listed = type("Listed", (list,), {"items": items})([case] * 3)
    task = SimpleNamespace(recipe=Recipe(classes={0: "background", 1: "organ"}))
    engine.draw_worst(torch.nn.Identity(), listed, scores, (), task, tmp_path)
    assert list(drawn) == [f"{n}_{w}.png" for n in ("1_bad", "2_good") for w in ("truth", "prediction")]
    assert drawn["1_bad_prediction.png"] == ("sub/bad: prediction, mean Dice 0.250", [3, 2, 1])
    assert drawn["1_bad_truth.png"] == ("sub/bad: truth", None)


def test_a_setting_without_a_score_is_chosen_last() -> None:
    assert choose({"a": NAN, "b": 0.1, "c": 0.4}) == "c" and choose({"a": 0.2, "b": NAN}) == "a"
    assert choose({"a": NAN, "b": NAN}) == "a"


def test_a_resume_that_finds_no_memory_does_not_blame_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = torch.nn.Linear(1, 1)
    run = engine.Run(model, torch.optim.AdamW(model.parameters()), torch.amp.GradScaler("cpu", enabled=False), tmp_path)
    run.save()
    for error in (torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("can't allocate memory: 8 bytes")):

        def fails(*_: object, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(model, "load_state_dict", fails)
        with pytest.raises(type(error), match="memory"):
            run.resume()

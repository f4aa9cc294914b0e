"""Lists of stages: read and refused before anything is trained."""

from __future__ import annotations

from pathlib import Path

import pytest

from dinov2.errors import BadInput
from dinov2.train.stages import read_stages


def test_the_papers_two_stages() -> None:
    standard, high = read_stages("pretrain/two_stage", "out", ["train.seed=3"])
    assert (standard.name, standard.config, standard.output_dir) == ("standard", "pretrain/vit_large", Path("out/standard"))
    teacher = "out/standard/eval/training_112499/teacher_checkpoint.pth"
    assert high.overrides == ["train.seed=3", f"student.full_pretrained_weights={teacher}"]


@pytest.mark.parametrize(
    "text, words",
    [
        ("stages: []", "expected `stages:`"),
        ("a: 1", "expected `stages:`"),
        ("stages: [", "not a readable YAML file"),
        ("stages: [{name: a}]", "stage 1: name and config must be given"),
        (
            "stages: [{name: a, config: pretrain/tiny_cpu, iterations: 3}]",
            "unknown key 'iterations' .*did you mean 'iteration'",
        ),
        ("stages: [{name: a, config: pretrain/tiny_cpu, weights_from: b}]", "no earlier stage .there is none."),
        (
            "stages: [{name: a, config: pretrain/tiny_cpu}, {name: a, config: pretrain/tiny_cpu}]",
            "stage 2: a stage 'a' was there before",
        ),
        (
            "stages: [{name: a, config: pretrain/tiny_cpu}, {name: b, config: pretrain/demo, weights_from: a, iteration: 5}]",
            "writes no teacher at iteration 5 .only every evaluation.eval_period_iterations=1000",
        ),
    ],
)
def test_an_ill_formed_list_is_refused(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "stages.yaml"
    path.write_text(text)
    with pytest.raises(BadInput, match=words) as err:
        read_stages(str(path), "out", [])
    assert str(path) in str(err.value) and "\n" not in str(err.value)

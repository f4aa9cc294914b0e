"""Queries that are embedded: by the weights and view of the table, or refused."""

from __future__ import annotations

from pathlib import Path

import torch

from dinov2.cli import main
from dinov2.data import write_datalist
from dinov2.features.embed import EmbedRequest, embed
from dinov2.features.encoder import load_encoder
from dinov2.models.vision_transformer import vit_tiny_3d
from tests.unit.features.retrieval.tables import hits, write_scan


def test_a_scan_that_is_not_in_the_table_is_embedded_as_the_tables_were(tmp_path: Path) -> None:
    """By the weights, dtype and view that the table names; its copy in the table is then at distance 0. Others are refused."""
    torch.manual_seed(0)
    torch.save(vit_tiny_3d(patch_size=8, img_size=16, init_values=0.5).state_dict(), tmp_path / "t.pth")
    (tmp_path / "data").mkdir()
    for i in range(3):
        write_scan(tmp_path / "data" / f"{i}.nii", (17, 12, 9), seed=i)
    items = [{"image": str(tmp_path / f"data/{i}.nii"), "shape": [17, 12, 9]} for i in range(3)]
    write_datalist(tmp_path / "data" / "l.json", items)
    write_scan(tmp_path / "copy.nii", (17, 12, 9), seed=1)
    encoder = load_encoder(tmp_path / "t.pth", "cpu")
    embed(tmp_path / "data" / "l.json", encoder, EmbedRequest(tmp_path / "f.parquet"), lambda line: None)
    words = ["retrieve", str(tmp_path / "f.parquet"), "--query", str(tmp_path / "copy.nii"), "-k", "2", "--device", "cpu"]
    assert main([*words, "--output", str(tmp_path / "h.html")]) == 0
    best = hits(tmp_path / "h.csv")[0]
    assert best["path"] == str(tmp_path / "data" / "1.nii"), "the table's paths begin in the list's folder"
    assert float(best["distance"]) < 1e-5
    torch.manual_seed(1)
    torch.save(vit_tiny_3d(patch_size=8, img_size=16, init_values=0.5).state_dict(), tmp_path / "other.pth")
    assert main([*words, "--output", str(tmp_path / "g.html"), "--weights", str(tmp_path / "other.pth")]) == 2
    assert not (tmp_path / "g.html").exists()

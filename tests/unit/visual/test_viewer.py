"""The page of `dinov2 visualize --viewer`, driven in a real Chromium without a network."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from dinov2.visual.viewer import ASSETS, MOST_COLOURS, MOST_VOXELS, PageScan, most_cells, quantised, viewer_page

CHROMIUM, DRIVER = (shutil.which(name) for name in ("chromium", "chromedriver"))
AFFINE = np.array([[0.0, -7.8, 1.1, 30.0], [-8.0, 0.0, 0.0, 40.0], [0.0, 1.04, 8.3, -35.0], [0, 0, 0, 1]])  # oblique
GRID, WIDTH = (9, 7, 11), 24  # odd: the middle, where the page begins, is no border between patches


def made_scan(name: str, seed: int) -> PageScan:
    """A ball with tokens that change smoothly with the place, at 2 voxels a patch and edge."""
    rng = np.random.default_rng(seed)
    cells = np.stack(np.meshgrid(*[np.arange(n) for n in GRID], indexing="ij"), -1)
    tokens = np.sin(cells @ rng.normal(0, 0.5, (3, WIDTH)) + rng.uniform(0, 6, WIDTH)) + rng.normal(0, 0.2, (*GRID, WIDTH))
    fine = np.diag([0.5, 0.5, 0.5, 1.0])
    fine[:3, 3] = -0.25
    voxels = np.stack(np.meshgrid(*[np.linspace(-1, 1, 2 * n) for n in GRID], indexing="ij"), -1)
    ball = np.linalg.norm(voxels, axis=-1) < 0.9
    image = np.where(ball, 0.4 + 0.3 * voxels[..., 0], 0).astype(np.float32)
    colours = np.where(ball[..., None], (voxels + 1) / 2, 1).astype(np.float32)
    attention = {n: rng.uniform(0, 0.01, GRID).astype(np.float32) for n in ("head 0", "mean of heads")}
    middle = (AFFINE @ [*((n - 1) / 2 for n in GRID), 1])[:3]
    return PageScan(
        name, "9 x 7 x 11 patches.", image, AFFINE @ fine, tokens.astype(np.float32), attention, AFFINE, colours, ball,
        AFFINE @ fine, tuple(middle.tolist()),
    )  # fmt: skip


SCANS = [made_scan("one </script><b>", 0), made_scan("two", 1)]


def cosines(asking: PageScan, cell: int, other: PageScan) -> np.ndarray:
    """In float64 from the features as they were; cells with h running fastest."""
    ask, rest = (s.tokens.astype(np.float64).transpose(2, 1, 0, 3).reshape(-1, WIDTH) for s in (asking, other))
    return rest @ ask[cell] / np.linalg.norm(rest, axis=1) / np.linalg.norm(ask[cell])


def test_cosines_of_quantised_tokens_are_those_of_the_tokens() -> None:
    rng = np.random.default_rng(0)
    tokens = rng.normal(size=(200, 384)) * np.exp(rng.normal(0, 1, 384))  # a few channels much larger than the others
    packed = quantised(tokens).astype(np.float64)
    assert quantised(tokens).dtype == np.int8 and np.abs(packed).max() == 127
    units = [t / np.linalg.norm(t, axis=1, keepdims=True) for t in (tokens, packed)]
    assert np.abs(units[0] @ units[0].T - units[1] @ units[1].T).max() < 1 / 127
    assert not quantised(np.zeros((2, 3))).any()


def test_the_page_is_whole_small_and_asks_for_nothing() -> None:
    page = viewer_page("scans", SCANS, "notes & more")
    markup = re.sub(r"<script>.*?</script>", "", page, flags=re.S)
    assert len(page) < 3_500_000 and "notes &amp; more" in page and "__" not in markup
    assert not re.findall(r"""(?:src|href)\s*=(?!\s*["']?data:)""", markup)
    assert "Redistributions in binary form must reproduce" in markup  # niivue's licence goes with it
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    assert data is not None and json.loads(data[1])["scans"][0]["name"] == "one </script><b>"


def test_two_scans_of_the_widest_network_fit_25_megabytes() -> None:
    assert most_cells(96) == most_cells(1024) == 4096
    for width in (1024, 1536):
        features = most_cells(width) * (width + 25)  # and the maps of ViT-g's heads and their mean
        packed = 2 * (features + MOST_VOXELS + 4 * MOST_COLOURS) * 4 / 3  # base64, were nothing compressed
        assert packed + len((ASSETS / "niivue.umd.js").read_bytes()) < 25e6


def test_niivue_is_the_file_that_its_licence_names() -> None:
    digest = hashlib.sha256((ASSETS / "niivue.umd.js").read_bytes()).hexdigest()
    assert f"SHA-256: {digest}" in (ASSETS / "NIIVUE_LICENSE").read_text()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium with software WebGL, told to have no network."""
    if CHROMIUM is None or DRIVER is None:
        pytest.skip("no Chromium: apt-get install chromium chromium-driver")
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    flags = [
        "headless=new",
        "no-sandbox",
        "disable-dev-shm-usage",
        "use-gl=angle",
        "use-angle=swiftshader",
        "enable-unsafe-swiftshader",
        "disable-background-networking",
        "disable-component-update",
        "window-size=820,660",
    ]
    for flag in flags:  # fmt: skip
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    driver.set_script_timeout(240)
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def opened(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The page from the disk."""
    from selenium.webdriver.support.ui import WebDriverWait

    path = tmp_path_factory.mktemp("page") / "viewer.html"
    path.write_text(viewer_page("scans", SCANS, "notes"), encoding="utf-8")
    browser.get(path.as_uri())
    WebDriverWait(browser, 240).until(lambda b: b.execute_script("return window.viewer && window.viewer.ready"))
    return browser


def state(browser: Any) -> dict[str, Any]:
    return browser.execute_script("return {...viewer.state}")


def shown(browser: Any, scan: int) -> np.ndarray:
    """The map that lies above a scan, as niivue has it."""
    return np.array(browser.execute_script(f"return Array.from(viewer.scans[{scan}].nv.volumes[1].img)"))


def crosshair(browser: Any, scan: int) -> list[float]:
    """Where it is in the scan's world, mm."""
    return browser.execute_script(
        f"const nv = viewer.scans[{scan}].nv; return Array.from(nv.frac2mm(nv.scene.crosshairPos, 0, true)).slice(0, 3)"
    )


def world(cell: int) -> np.ndarray:
    """A patch's middle, mm."""
    h, w, _ = GRID
    return (AFFINE @ [cell % h, cell // h % w, cell // (h * w), 1])[:3]


def press(browser: Any, keys: str) -> None:
    from selenium.webdriver.common.by import By

    browser.find_element(By.TAG_NAME, "body").send_keys(keys)


def test_a_click_in_the_page_shows_the_similarity_that_python_computes(opened: Any) -> None:
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.by import By

    opened.find_element(By.ID, "mode-similarity").click()
    canvases = opened.find_elements(By.TAG_NAME, "canvas")
    assert len(canvases) == 2
    asked = []
    for canvas, right, down in ((0, -0.29, -0.22), (0, -0.21, -0.27), (1, -0.25, -0.25)):  # in the upper left plane
        size = canvases[canvas].size
        ActionChains(opened).move_to_element_with_offset(
            canvases[canvas], int(right * size["width"]), int(down * size["height"])
        ).click().perform()
        now = state(opened)
        assert now["scan"] == canvas
        asked.append((canvas, now["cell"]))
        at = crosshair(opened, canvas)
        nearest = np.rint(np.linalg.solve(AFFINE, [*at, 1.0])[:3]).clip(0, np.array(GRID) - 1).astype(int)
        assert now["cell"] == nearest[0] + GRID[0] * (nearest[1] + GRID[1] * nearest[2])
        for other in range(2):
            expected = cosines(SCANS[canvas], now["cell"], SCANS[other])
            np.testing.assert_allclose(shown(opened, other), expected, atol=1 / 127)
        best = int(shown(opened, 1 - canvas).argmax())  # the other scan goes to what is most like it
        np.testing.assert_allclose(crosshair(opened, 1 - canvas), world(best), atol=0.1)
    assert len(set(asked)) == 3  # each click is another patch


def test_layers_heads_opacity_and_views_change_by_keys(opened: Any) -> None:
    def opacities() -> list[float]:
        return opened.execute_script("return viewer.scans[0].nv.volumes.map(v => v.opacity)")

    press(opened, "1")
    assert state(opened)["mode"] == "pca" and opacities()[1] == 0 and opacities()[2] == pytest.approx(0.65)
    press(opened, "2")
    assert opacities()[2] == 0
    for head, name in ((1, "mean of heads"), (0, "head 0")):
        assert state(opened)["head"] == head
        expected = SCANS[0].attention[name].transpose(2, 1, 0).ravel()
        np.testing.assert_allclose(shown(opened, 0), expected, atol=expected.max() / 255)
        press(opened, "h")
    press(opened, "-")
    assert state(opened)["opacity"] == pytest.approx(0.55) and opacities()[1] == pytest.approx(0.55)
    press(opened, "+")
    assert state(opened)["opacity"] == pytest.approx(0.65)
    press(opened, "0")
    assert opacities() == [1, 0, 0]
    drawn = []
    for view in ("axial", "coronal", "sagittal", "render", "all"):
        press(opened, "v")
        assert state(opened)["view"] == view
        drawn.append(opened.execute_script("return viewer.scans.map(({nv}) => nv.opts.sliceType)"))
    assert drawn == [[kind, kind] for kind in (0, 1, 2, 4, 3)]  # niivue's SLICE_TYPE
    press(opened, "3")
    before = state(opened)["cell"]
    press(opened, "\ue014")  # the right arrow: the next patch towards the patient's right
    after = state(opened)["cell"]
    assert world(after)[0] - world(before)[0] == pytest.approx(7.8)


def test_it_fits_a_phone(opened: Any) -> None:
    opened.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 400, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    )
    try:
        widths = opened.execute_script(
            "return [document.documentElement.scrollWidth, document.querySelector('canvas').clientWidth]"
        )
        assert widths[0] <= 400 and widths[1] > 340
    finally:
        opened.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_nothing_went_wrong_and_nothing_was_fetched(opened: Any) -> None:
    """Of all tests before it."""
    assert [entry for entry in opened.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")] == []
    events = [json.loads(entry["message"])["message"] for entry in opened.get_log("performance")]
    asked = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    assert any(url.startswith("file:") for url in asked)
    assert [url for url in asked if not url.startswith(("file:", "data:", "blob:"))] == []

"""Any configuration is taken or refused in a line."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from dinov2.configs import load_and_merge_config_3d
from dinov2.configs.errors import ConfigError
from dinov2.configs.loader import config_keys
from tests.fuzzing import SETTINGS, documents, for_a_minute, numbers, plain, works_or_is_refused

KEYS = [key for key, _ in config_keys()]
DELICATE = [
    "", "null", "None", "~", "???", "true", "[1, 2]", "[", "]", "{a: 1}", "{", "${train.seed}", "${", "${oc.env:HOME}",
    "${nowhere}", "!!python/object:os.system x", "!!binary 1", "&a [*a]", "*a", "0x10", "1_000", "1e400", ".nan", ".inf",
    "-.inf", "'", '"', "a: b", "2001-01-01", "\t", "a\nb", "\x00", "\u2028", "%", "@", "|", ">", "[" * 3000, "a" * 300,
]  # fmt: skip
words = st.sampled_from(DELICATE) | numbers.map(str) | st.text(max_size=10)


@st.composite
def keys(draw: st.DrawFn) -> str:
    """A key, or one that is nearly one."""
    key = draw(st.sampled_from(KEYS))
    kinds = (
        key,
        key.split(".")[0],
        f"{key}.x",
        f"{key}[0]",
        key[:-1],
        key.replace(".", ".."),
        key.upper(),
        draw(st.text(max_size=8)),
    )
    return draw(st.sampled_from([key] * 6 + list(kinds)))


@st.composite
def files(draw: st.DrawFn) -> bytes:
    """YAML of the schema's sections with values of any kind; sometimes damaged, sometimes anything."""
    content: dict = draw(st.dictionaries(st.text(max_size=6), documents, max_size=1))
    if draw(st.integers(0, 5)) == 0:
        content["base"] = draw(plain | documents | st.sampled_from(DELICATE))
    for key in draw(st.lists(st.sampled_from(KEYS), max_size=4)):
        section, _, leaf = key.partition(".")
        inner = content.setdefault(section, {})
        if isinstance(inner, dict):
            inner[leaf] = draw(plain | documents | st.sampled_from(DELICATE))
    text = bytearray(yaml.safe_dump(content, allow_unicode=draw(st.booleans())).encode("utf-8", "surrogatepass"))
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 3]))):
        place = draw(st.integers(0, len(text)))
        text[place : place + draw(st.integers(0, 3))] = draw(
            st.binary(max_size=3) | st.sampled_from([b"\n", b":", b"- ", b"{", b"*"])
        )
    anything = st.binary(max_size=40) | st.sampled_from([b"[" * 3000, b"train: " + b"{a: " * 3000])
    return draw(anything) if draw(st.integers(0, 9)) == 0 else bytes(text)


@pytest.mark.slow
def test_any_words_are_a_configuration_or_refused_in_a_line() -> None:
    @SETTINGS
    @given(pairs=st.lists(st.tuples(keys(), words), max_size=4), joined=st.sampled_from(["=", "=", "=", "==", "", " = "]))
    def claim(pairs: list[tuple[str, str]], joined: str) -> None:
        given_words = [f"{key}{joined}{value}" for key, value in pairs]
        works_or_is_refused(lambda: load_and_merge_config_3d(None, given_words), ConfigError)

    for_a_minute(claim, parts=2)


@pytest.mark.slow
def test_any_file_is_a_configuration_or_refused_in_a_line(tmp_path: Path) -> None:
    @SETTINGS
    @given(content=files())
    def claim(content: bytes) -> None:
        (tmp_path / "any.yaml").write_bytes(content)
        works_or_is_refused(lambda: load_and_merge_config_3d(tmp_path / "any.yaml"), ConfigError)

    for_a_minute(claim, parts=2)

"""Whatever is written into a YAML file or after --set: a config, or one line that says what is wrong."""

import pytest
import yaml
from conftest import REPO
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from config import Config, UserError, load_config
from config.command_line import MAIN_CONFIG

TRY = settings(max_examples=300, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])
KEYS = [f"{section}.{key}" for section, values in Config().to_dict().items() for key in values]
MAIN = MAIN_CONFIG.read_text(encoding="utf-8")
scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20),
                    st.sampled_from(["5e-4", "1e999", ".nan", "-.inf", "0x10", "1_000", "2024-01-01", "yes", "~", ""]))
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3)
                      | st.dictionaries(st.text(max_size=8), inner, max_size=3), max_leaves=5)


def config_or_one_line(path, overrides=()) -> bool:
    try:
        config = load_config(path, overrides)
    except UserError as error:
        return bool(str(error).strip()) and "\n" not in str(error) and len(str(error)) < 2_000
    return isinstance(config, Config) and load_config(path, overrides) == config


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz") / "config.yaml"


@TRY
@given(text=st.text(max_size=200))
def test_any_text(file, text):
    file.write_text(text, encoding="utf-8", errors="surrogatepass", newline="")
    assert config_or_one_line(file)


@TRY
@given(content=st.binary(max_size=200))
def test_any_bytes(file, content):
    file.write_bytes(content)
    assert config_or_one_line(file)


@TRY
@given(place=st.integers(0, len(MAIN)), cut=st.integers(0, 30), new=st.text(max_size=5) | st.sampled_from(
    ["\n", ":", "  ", "\t", "- ", "{", "]", "&a", "*a", "!!python/object/apply:os.system [ls]", "<<: ", "#", "|", "'"]))
def test_the_main_config_with_something_else_in_one_place(file, place, cut, new):
    file.write_text(MAIN[:place] + new + MAIN[place + cut:], encoding="utf-8", errors="surrogatepass")
    assert config_or_one_line(file)


@TRY
@given(sections=st.dictionaries(st.sampled_from([key.partition(".")[0] for key in KEYS]) | st.text(max_size=8), values))
def test_any_values_in_any_sections(file, sections):
    file.write_text(yaml.safe_dump(sections), encoding="utf-8")
    assert config_or_one_line(file)


@TRY
@given(key=st.sampled_from(KEYS), value=values)
def test_any_value_for_a_key(file, key, value):
    section, _, name = key.partition(".")
    file.write_text(yaml.safe_dump({section: {name: value}}), encoding="utf-8")
    assert config_or_one_line(file)


@TRY
@given(overrides=st.lists(st.text(max_size=30) | st.builds("{}={}".format, st.sampled_from(KEYS), st.text(max_size=20)),
                          max_size=3))
def test_any_override(overrides):
    assert config_or_one_line(REPO / "config" / "quickstart.yaml", overrides)

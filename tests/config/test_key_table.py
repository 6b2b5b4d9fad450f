"""docs/TRAINING_GUIDE.md has a table of every config key, which --help names."""

import dataclasses
import re
from typing import get_type_hints

import pytest
from conftest import REPO

import train
from config import Config
from config.values import _check_value, parse_yaml

ROW = re.compile(r"\| `(\w+)\.(\w+)` \| (.+?) \| (.+?) \| (.+?) \|")


def test_the_table_of_keys_is_the_schema():
    """The same keys in the same order, with the types that error messages name and the same defaults."""
    rows = [row.groups() for row in map(ROW.fullmatch, (REPO / "docs" / "TRAINING_GUIDE.md").read_text(
        encoding="utf-8").splitlines()) if row]
    sections = {field.name: field.default for field in dataclasses.fields(Config)}
    keys = [(name, field.name) for name, section in sections.items() for field in dataclasses.fields(section)]
    assert [(section, key) for section, key, *_ in rows] == keys
    for section, key, kind, default, meaning in rows:
        hint = get_type_hints(type(sections[section]), include_extras=True)[key]
        with pytest.raises(ValueError) as caught:
            _check_value(object(), hint)
        assert kind == str(caught.value), f"{section}.{key}"
        value = parse_yaml(default.strip("`").replace("\\|", "|"), "")
        assert _check_value(value, hint) == getattr(sections[section], key), f"{section}.{key}"
        assert len(meaning) > 10, f"{section}.{key}"


def test_help_names_the_table(run_main):
    status, out, _ = run_main(train, "--help")
    assert status == 0 and "docs/TRAINING_GUIDE.md has a table of all keys" in " ".join(out.split())

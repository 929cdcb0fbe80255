"""The list of mutants names text and tests that exist; `make mutants` puts the faults in."""

from __future__ import annotations

import re

import pytest
import yaml
from conftest import ROOT

MUTANTS = yaml.safe_load((ROOT / "tests" / "mutants.yaml").read_text())


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant["name"])
def test_text_and_tests_of_a_mutant_exist(mutant):
    assert (ROOT / mutant["file"]).read_text().count(mutant["old"]) == 1
    for test in mutant["tests"]:
        file, _, name = test.partition("::")
        function = name.partition("[")[0]
        assert not name or re.search(rf"^def {function}\(", (ROOT / file).read_text(), re.MULTILINE), test

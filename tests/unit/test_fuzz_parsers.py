"""A few thousand cases of `scripts/fuzz_parsers.py`; the script runs a million."""

import importlib.util
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "scripts" / "fuzz_parsers.py"


def test_no_text_breaks_a_parser() -> None:
    spec = importlib.util.spec_from_file_location("fuzz_parsers", SCRIPT)
    assert spec is not None and spec.loader is not None
    fuzz = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fuzz)
    done, _, _, failures = fuzz.run_many((1, 0, 3000))
    assert (done, failures) == (3000, [])
    assert len({fuzz.case(1, number)[0] for number in range(3000)}) > 2500, "the cases differ"

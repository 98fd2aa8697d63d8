"""What the compiler makes of the C module. This is a statement about speed and about one compiler,
so it is not made where packages are built: not every machine has vector instructions."""

import platform
import re
from pathlib import Path

import pytest

from c_module import SOURCE, compiled


@pytest.mark.skipif(
    platform.machine() not in ("x86_64", "aarch64"), reason="only these always have vectors"
)
@pytest.mark.parametrize(
    ("compiler", "option"), [("gcc", "-fopt-info-vec"), ("clang", "-Rpass=loop-vectorize")]
)
def test_compilers_vectorize_the_loop(tmp_path: Path, compiler: str, option: str) -> None:
    """If the optimisation is lost, everything still works but takes three times as long."""
    said = compiled(tmp_path / "_fast_path.so", option, compiler=compiler)
    lines = SOURCE.read_text().splitlines()
    places = [int(line) for line in re.findall(r"_fast_path\.c:(\d+):\d+: .*vectorized", said)]
    assert any("for (" in line for line in (lines[place - 1] for place in places)), said

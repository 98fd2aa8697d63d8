"""Fuzz all targets: PYTHONPATH=.:tests python3 -m fuzz [SECONDS for each]

Uses atheris, which looks for inputs that reach new code, starting from those in `corpus`. What it
adds there is worth keeping. An input that shows a bug is left as crash-*.
"""

import subprocess
import sys
from pathlib import Path

SECONDS = 60

#: Additional seconds allowed, mainly for preparation.
GRACE = 300

CORPUS = Path(__file__).parent / "corpus"


def main(arguments: list[str]) -> int:
    """Fuzz one target after the other; 1 if there is a bug."""
    seconds = int(arguments[0]) if arguments else SECONDS
    failed = [folder.name for folder in sorted(CORPUS.iterdir()) if not is_good(folder, seconds)]
    print(f"bugs in {', '.join(failed)}" if failed else "no bugs found")
    return bool(failed)


def is_good(folder: Path, seconds: int) -> bool:
    """Whether a target has no bug; in a separate process, which a bug terminates."""
    options = (f"-max_total_time={seconds}", "-max_len=4096", "-timeout=10", folder)
    command = (sys.executable, "-m", "fuzz", "--target", folder.name, *options)
    return not subprocess.run(command, check=False, timeout=seconds + GRACE).returncode


def fuzz(target: str, options: list[str]) -> None:
    """Fuzz one target with options of libFuzzer; ends the process."""
    import atheris  # only ever here

    # Tracing where an input leads slows everything down, so only the modules under test are
    # traced.
    with atheris.instrument_imports(include=["argparse", "tcpupperd", "tomllib"]):
        import tomllib  # noqa: F401

        from fuzz.targets import run
    atheris.Setup(["fuzz", *options], lambda data: run(target, data))
    atheris.Fuzz()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--target"]:
        fuzz(sys.argv[2], sys.argv[3:])
    sys.exit(main(sys.argv[1:]))

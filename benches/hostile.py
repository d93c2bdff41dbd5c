"""How long is a hostile model file or archive looked at before it is refused? The slowest of them tells.

    python -m benches.hostile [--quick] [--json]

Every folder, file and archive of `apprentice.testing.hostile` is given to what a backend asks before a library opens it, three
times (once with `--quick`); the longest counts, by the clock on the wall, so the machine should be quiet.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from apprentice import weights
from apprentice.errors import UnsafeFile
from apprentice.testing import hostile
from apprentice.weights import Expected
from benches import Figure, Options, at_most, run, shown


def refusal(artefact: hostile.Artefact, *, packed: bool) -> float:
    """Seconds until it is refused. Raises AssertionError where it is not."""
    with tempfile.TemporaryDirectory(prefix="apprentice-hostile-") as room:
        folder = Path(room) / "made"
        folder.mkdir()
        path = artefact.build(folder, Path(room) / "canary")
        base = hostile.BASE if (path / "adapter_config.json").exists() else None  # as a backend knows it
        began = time.perf_counter()
        try:
            if packed:
                weights.unpack(path, folder / "into")
            else:
                weights.check(path, expected=Expected(base=base))
        except UnsafeFile:
            return time.perf_counter() - began
    raise AssertionError(f"{artefact.name} was not refused")


def measure(options: Options) -> list[Figure]:
    """The slowest and the usual refusal, of weights and of archives."""
    figures: list[Figure] = []
    for kind, artefacts in (("model files", hostile.model_files()), ("archives", hostile.archives())):
        rounds = range(1 if options.quick else 3)
        took = {one.name: max(refusal(one, packed=kind == "archives") for _ in rounds) for one in artefacts}
        slowest = sorted(took, key=took.__getitem__, reverse=True)[:5]
        options.say(f"slowest {kind}: " + "; ".join(f"{name} {took[name]:.3f} s" for name in slowest))
        figures += [
            shown(f"hostile {kind}", len(took)),
            shown(f"refusal of hostile {kind}, median", median(took.values()), "s"),
            at_most(f"refusal of hostile {kind}, longest", took[slowest[0]], 1, "s"),
        ]
    return figures


if __name__ == "__main__":
    sys.exit(run("hostile", measure))

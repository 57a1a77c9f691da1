"""The project's own attack: files that were changed, commands that are killed, a server that is pestered.

    python benchmarks/attack.py [--bundles 8000] [--packs 1000] [--pictures 1000] [--installs 200] [--exports 50]
                                [--enrolments 200] [--calibrations 50] [--trainings 100] [--seconds 600]
                                [--clients 32] [--silent 300] [--seed 0] [--work FOLDER]

Bounded and seeded: the same numbers give the same files and requests. A kind of which none are asked for is left out.
What each attack does, and what counts as a fault, stands in attack_files.py, attack_kills.py and attack_server.py.
Prints what was found; the last line of stdout is JSON. Exit code 1 when something was.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path

import attack_files  # of this folder, as the next two
import attack_kills
import attack_server
from attack_files import Found

NUMBERS = {"bundles": 8000, "packs": 1000, "pictures": 1000, "installs": 200, "exports": 50, "calibrations": 50}
NUMBERS |= {"enrolments": 200, "trainings": 100, "seconds": 600, "clients": 32, "silent": 300, "seed": 0}


def attacks(given: argparse.Namespace, work: Path) -> Iterator[tuple[str, Callable[[], Found]]]:
    """Each with its name: those of which some are asked for."""
    cli, seed = [sys.executable, "-m", "cdl_edge.cli"], given.seed
    if given.pictures:
        yield "changed pictures", lambda: attack_files.attack_pictures(given.pictures, seed)
    at = attack_kills.prepare(work, cli)
    pack, old, run = at["update.pack"], at["old"], at["run0"]
    if given.bundles:
        yield "changed bundles", lambda: attack_files.attack_bundles(old, given.bundles, work, seed)
    if given.packs:
        yield "changed packs", lambda: attack_files.attack_packs(pack, old, given.packs, work, seed)
    if given.seconds:
        yield "bad requests", lambda: attack_server.attack(old, given.seconds, given.clients, given.silent, seed=seed)
    if given.installs:
        yield "killed installs", lambda: attack_kills.kill_installs(pack, old, given.installs, work, seed, cli)
    if given.enrolments:
        teachable = attack_kills.prepare_enrolments(work, cli)
        yield "killed enrolments", lambda: attack_kills.kill_enrolments(teachable, given.enrolments, work, seed, cli)
    commands = {"exports": ["export", str(run), "--images", "8"], "calibrations": ["calibrate", str(old)]}
    for name, command in commands.items():
        if count := getattr(given, name):
            out = work / name / "bundle"
            out.parent.mkdir()
            whole = [*cli, *command, "--out", str(out)]
            yield f"killed {name}", functools.partial(attack_kills.kill_bundle_command, whole, out, count, seed)
    if given.trainings:
        out = work / "trainings" / "run"
        train = attack_kills.train_command(cli, work, out)
        yield "killed trainings", lambda: attack_kills.kill_trainings(train, out, given.trainings, seed)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, count in NUMBERS.items():
        parser.add_argument(f"--{name}", type=int, default=count)
    parser.add_argument("--work", type=Path, help="folder to work in [default: a temporary one]")
    given = parser.parse_args()
    results: dict[str, Found] = {}
    with tempfile.TemporaryDirectory(prefix="cdl-edge-attack-", dir=given.work) as folder:
        for name, attack in attacks(given, Path(folder)):
            begin = time.monotonic()
            results[name] = found = attack()
            found.seconds = round(time.monotonic() - begin, 1)
            outcomes = ", ".join(f"{n} {what}" for what, n in sorted(found.outcomes.items()))
            line = f"{name:18s} {found.cases:7d}  {outcomes}  faults {len(found.faults)}"
            print(f"{line}  {found.peak_mb:.0f} MB  {found.seconds:.0f} s", flush=True)
            for fault in found.faults[:20]:
                print(f"    {fault}", flush=True)
    numbers = {name: getattr(given, name) for name in NUMBERS}
    about = {"date": datetime.now(timezone.utc).strftime("%Y-%m-%d"), "numbers": numbers}
    print(json.dumps({**about, "found": {name: found.to_json() for name, found in results.items()}}))
    sys.exit(any(found.faults for found in results.values()))


if __name__ == "__main__":
    main()

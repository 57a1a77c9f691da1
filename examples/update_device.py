"""Send a device what it does not know yet: a pack with what learning changed, and the way back.

    cp -r bundles/fruit device            # what the device has
    python examples/update_device.py bundles/fruit bundles/fruit-new device

One sees the size of the pack beside that of the bundle, the versions that the device keeps, and the version it runs
after going back. `device` becomes a store: the same path for every reader, which sees the old version or the new one,
never a mixture.
"""

from __future__ import annotations

import sys
from pathlib import Path

import cdl_edge.runtime as runtime
from cdl_edge.updates import packs


def main(old: str, new: str, device: str) -> list[str]:
    """Returns: the versions that ran: before, after the update, after going back."""
    pack = Path(device).with_suffix(".pack")
    made = packs.create(old, new, pack)  # where you train; sign it: key="private.pem"
    print(f"{pack}: {made['bytes'] / 1e3:.0f} kB, {100 * made['share']:.1f} % of the bundle")
    for name, entry in made["files"].items():
        print(f"  {name}: {entry['encoding']}, {entry['bytes']} bytes for {entry['of']}")

    ran = [runtime.open_bundle(device).manifest.version]
    ran.append(packs.install(pack, device)["version"])  # on the device; self-test before the swap
    for kept in packs.listed(device):
        print(f"{'*' if kept['current'] else ' '} {kept['version']}  {kept['classes']} classes, {kept['installed']}")
    ran.append(packs.rollback(device)["version"])
    print(f"back to {ran[-1]}")
    return ran


if __name__ == "__main__":
    main(*sys.argv[1:])

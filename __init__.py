"""cdl-edge: from a folder of photographs to a small, fast, updatable classifier on an edge device.

The commands of the command line are functions here: `from cdl_edge import train, export, predict`; see api.py.

Some of them have the name of a package too. The name in this module is always the function; what the package holds is
imported by its whole name: `from cdl_edge.train.config import TrainConfig`.
"""

from __future__ import annotations

import os

# ONNX Runtime from 1.29 on tells its makers of every model that is loaded: a number for this machine, the names and
# hashes of the graph. It looks at this when it is imported, so it is said before. "0" leaves it on.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

# By whole names, for pytest imports this file a second time, under the name of the folder that it lies in.
# A package puts its name into its parent once, when it is first loaded. So these are loaded first (they hold nothing
# but a docstring), and the functions get their names behind them, for good.
from cdl_edge import calibrate as _calibrate
from cdl_edge import export as _export
from cdl_edge import report as _report
from cdl_edge import sweep as _sweep
from cdl_edge import train as _train
from cdl_edge.api import (
    build,
    calibrate,
    compare,
    create_pack,
    doctor,
    enrol,
    enrolments,
    evaluate,
    export,
    export_enrolments,
    inspect,
    install_pack,
    predict,
    pretrain,
    profile,
    pull_packs,
    push_pack,
    remove_enrolment,
    rename_enrolment,
    report,
    rollback,
    serve,
    sweep,
    train,
    trusted_keys,
    validate,
    versions,
    watch,
)

__version__ = "0.1.0"
__all__ = [
    "build",
    "calibrate",
    "compare",
    "create_pack",
    "doctor",
    "enrol",
    "enrolments",
    "evaluate",
    "export",
    "export_enrolments",
    "inspect",
    "install_pack",
    "predict",
    "pretrain",
    "profile",
    "pull_packs",
    "push_pack",
    "remove_enrolment",
    "rename_enrolment",
    "report",
    "rollback",
    "serve",
    "sweep",
    "train",
    "trusted_keys",
    "validate",
    "versions",
    "watch",
]
del _calibrate, _export, _report, _sweep, _train

"""Names of the files in a RUN and in a BUNDLE, and the versions of their documents: each is said here and nowhere else.

RUN     config.json  metrics.json  student.safetensors  teacher.safetensors  ranges.npz  report.html
BUNDLE  manifest.json  student.onnx ...  backbone.bin  prompts.bin  selftest.npz  ranges.npz  statistics.npz
        enrolments.npz  pictures/  layers.json
"""

from __future__ import annotations

RUN_SCHEMA = 1
"version of a run's metrics.json and weights that this code writes; newer ones are refused"
BUNDLE_SCHEMA = 2
"version of a bundle's manifest.json that this code writes; older ones are read, newer ones refused"

LAYERS_SCHEMA = 1
"version of a bundle's layers.json; newer ones are refused"

CONFIG = "config.json"
METRICS = "metrics.json"
"written last: its presence says that the run is finished"
REPORT = "report.html"
STUDENT_WEIGHTS = "student.safetensors"

MANIFEST = "manifest.json"
BACKBONE = "backbone.bin"
"constants that no learning changes: an update leaves them where they are"
PROMPTS = "prompts.bin"
"constants that learning changes: prompts, keys, heads"
SELFTEST = "selftest.npz"
RANGES = "ranges.npz"
"of the tensors of each task, in a RUN and in a BUNDLE"
LAYERS = "layers.json"
"the linear layers of each float graph, for calibrate; see layer_table.py"
STATISTICS = "statistics.npz"
"class statistics that the head is made from"
ENROLMENTS = "enrolments.npz"
"features of the pictures that classes were enrolled from on the device"
PICTURES = "pictures"
"folder of those pictures themselves, where they are kept; each is named by its content"
SELECTIONS = "selections.npz"
"the prompts that each task selects: of each weights input the mean over the task's images, float32 (T, L, K)"
ENGINES = "engines"
"folder of TensorRT engines; the manifest lists none of them"
SCHEMES_KEY = "flavours"
"of the quantisation schemes in manifests and in `calibrate --json`: the name that they had when the format was made"


def weights_of(side: str) -> str:
    """The file of a run with what "teacher" or "student" has learnt."""
    return f"{side}.safetensors"

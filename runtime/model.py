"""A graph with its constants in memory: the very bytes that the manifest's hashes were compared with.

Engines get these and read no file themselves: what happens to the files under an open runner changes no answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..artefacts.bundle import Bundle
from ..artefacts.external import external_files, external_records, inlined, used_names
from ..errors import InputError


@dataclass(frozen=True)
class Model:
    """One graph of a bundle, ready to be loaded."""

    path: Path
    "for messages: nothing is read there any more"
    graph: bytes
    "the ONNX model as it is in its file"
    contents: Mapping[str, np.ndarray]
    "of each file that its constants are in, uint8 (bytes,), by the name that the graph calls it"

    def constants(self) -> dict[str, np.ndarray]:
        """The constants outside of the graph that it uses, by name; where possible they are views of `contents`.

        Raises: InputError for a constant that does not lie in its file.
        """
        used = used_names(self.graph)
        records = [record for record in external_records(self.graph) if record.name in used]
        return {r.name: np.require(r.view(self.contents[r.location]), requirements="A") for r in records}

    def whole(self) -> bytes:
        """Graph and constants in one piece. Raises: InputError where that is too large."""
        return inlined(self.graph, self.contents)


def read_model(bundle: Bundle, key: str) -> Model:
    """Read a graph of a bundle, and the files that its constants are in, each compared with its hash.

    Raises: InputError for a graph that is not there, that has changed, or that reads a file which no hash covers.
    """
    name = bundle.graph_file(key)
    path, folder = bundle.path / name, Path(name).parent
    graph = bundle.read(name).tobytes()
    listed, contents = bundle.manifest.files, {}
    own = {record.location for record in external_records(graph)}
    for location in sorted(external_files(graph)):
        file = (folder / location).as_posix()
        if file not in listed:
            raise InputError(
                f"{path}: the graph reads a file that the manifest does not list",
                got=repr(location),
                expected="one of " + ", ".join(listed),
                fix="do not use this bundle; export it again",
            )
        if location not in own:
            raise InputError(
                f"{path}: a constant outside of the graph that is none of its initializers",
                got=f"in {location}: of a subgraph, a function, a node or a sparse tensor",
                expected="initializers only",
                fix="do not use this bundle; export it again",
            )
        contents[location] = bundle.read(file)
    return Model(path, graph, contents)

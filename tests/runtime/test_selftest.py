"""The self-test passes on a sound bundle and finds one whose weights are wrong."""

from __future__ import annotations

import io

import numpy as np
import pytest

from cdl_edge.errors import InputError
from cdl_edge.runtime.bundle import open_bundle, write_bundle
from cdl_edge.runtime.selftest import self_test


def test_a_sound_bundle(make_version):
    result = self_test(open_bundle(make_version(1)), threads=1)
    assert list(result) == ["fp32"]
    assert result["fp32"]["images"] == 2 and result["fp32"]["outputs"]["logits"]["max_abs_error"] < 1e-5


@pytest.mark.parametrize("shift", [0.01, np.nan])
def test_other_answers_are_found(make_version, tmp_path, shift):
    bundle = open_bundle(make_version(1))
    images, logits = bundle.selftest()
    logits[0, 0] += shift
    stream = io.BytesIO()
    np.savez(stream, images=images, logits=logits)
    files = {name: bundle.path / name for name in bundle.manifest["files"]} | {"selftest.npz": stream.getvalue()}
    wrong = write_bundle(tmp_path / "wrong", bundle.manifest, files)
    with pytest.raises(InputError, match="the self-test fails"):
        self_test(wrong, threads=1)


@pytest.mark.parametrize("content", [b"", b"no archive", {"images": 1}, {"images": 0, "logits": 0}, {"logits": 1}])
def test_a_self_test_that_is_none(make_version, tmp_path, content):
    bundle = open_bundle(make_version(1))
    if isinstance(content, dict):
        images, logits = bundle.selftest()
        arrays = {"images": images, "logits": logits}
        stream = io.BytesIO()
        np.savez(stream, **{name: arrays[name][: 2 * keep] for name, keep in content.items()})
        content = stream.getvalue()
    files = {name: bundle.path / name for name in bundle.manifest["files"]} | {"selftest.npz": content}
    with pytest.raises(InputError, match=r"no self-test|does not fit"):
        self_test(write_bundle(tmp_path / "wrong", bundle.manifest, files), threads=1)


def test_a_bundle_without_one(bundle):
    with pytest.raises(InputError, match="no self-test"):
        self_test(bundle, threads=1)

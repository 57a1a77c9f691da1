"""Options: an unknown one is an error, a wrong one is refused before anything is written."""

import itertools
import json
import math
from dataclasses import replace

import pytest

from cdl_edge.errors import InputError
from cdl_edge.train.config import AUGMENTATIONS, PRECISIONS, QUERIES, TrainConfig
from cdl_edge.train.distill import DISTILLERS
from cdl_edge.train.learners import LEARNERS

BASE = {"data": "digits", "out": "x"}


def refused(*words, **change):
    with pytest.raises(InputError) as info:
        TrainConfig.from_json({**BASE, **change})
    text = str(info.value)
    for word in words:
        assert word in text, text


def test_round_trip_through_json():
    config = TrainConfig("digits", "x", learner="apt", limit_per_class=5, compat=True, alpha=0.3)
    assert TrainConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
    assert TrainConfig.from_json(BASE) == TrainConfig("digits", "x")


@pytest.mark.parametrize(("learner", "distill"), [("frozen", "none"), ("finetune", "none"), ("apt", "kdp")])
def test_only_learners_of_prompts_distil_by_themselves(learner, distill):
    assert TrainConfig("digits", "x", learner=learner).distill == distill


def test_an_unknown_key_names_the_closest():
    # Trap 11: unknown keys silently accepted.
    refused("unknown training option", "'batchsize'", "did you mean 'batch_size'?", batchsize=3)
    refused("'learning-rate'", "did you mean 'learning_rate'?", **{"learning-rate": 1})


@pytest.mark.parametrize("key", ["data", "out"])
def test_a_required_option_is_missing(key):
    with pytest.raises(InputError) as info:
        TrainConfig.from_json({k: v for k, v in BASE.items() if k != key})
    assert key in str(info.value)


@pytest.mark.parametrize(
    ("key", "value", "close"),
    [
        ("learner", "l2", "l2p"),
        ("learner", "dual-prompt", "dualprompt"),
        ("distill", "kdpp", "kdp"),
        ("query", "two-passes", "two-pass"),
        ("precision", "bf32", "fp32"),
        ("augment", "crop_flip", "crop-flip"),
        ("kd_head", "normalized", "normalised"),
        ("resize_rule", "squish", "squash"),
        ("devices", "cuda0", "cuda"),
    ],
)
def test_a_word_that_is_none_of_the_choices(key, value, close):
    refused(repr(value), f"did you mean {close!r}?", **{key: value})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("tasks", 0),
        ("epochs", 0),
        ("batch_size", -1),
        ("kd_blocks", 0),
        ("kd_length", 5),
        ("kd_length", -2),
        ("limit_per_class", 0),
        ("range_images", -1),
        ("alpha", -0.1),
        ("alpha", 1.1),
        ("alpha", math.nan),
        ("tau", 0.0),
        ("tau", math.nan),
        ("tau", math.inf),
        ("query_regulariser", -1e-4),
        ("query_regulariser", math.inf),
        ("query_regulariser", math.nan),
        ("learning_rate", 0.0),
        ("learning_rate", -1e-3),
        ("learning_rate", math.inf),
        ("seed", -1),
    ],
)
def test_ranges(key, value):
    refused(str(value), **{key: value})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("tasks", "five"),
        ("tasks", 2.5),
        ("tasks", True),
        ("compat", "no"),
        ("compat", 0),
        ("alpha", "0.5"),
        ("data", 3),
        ("out", None),
        ("limit_per_class", "all"),
        ("learner", ["coda"]),
        ("tau", "2"),
        ("teachers", 3),
        ("query_regulariser", None),
        ("kd_head", None),
    ],
)
def test_wrong_types_in_a_file(key, value):
    # bool("0") is True: a JSON file must say false, not "no".
    refused(key, "wrong type", repr(value), **{key: value})


def test_good_edges():
    for change in (
        {"alpha": 0},
        {"tasks": None},
        {"alpha": 1.0},
        {"kd_length": 0},
        {"kd_head": "linear", "learner": "apt"},
        {"kd_head": "normalised", "distill": "none"},
        {"limit_per_class": None},
        {"learning_rate": 1},
        {"tau": None},
        {"tau": 1},
        {"teachers": None},
        {"teachers": "folder"},
        {"query_regulariser": 1e-4, "query": "one-pass"},
    ):
        TrainConfig.from_json({**BASE, **change})
    assert (QUERIES, PRECISIONS[0], AUGMENTATIONS[0]) == (("two-pass", "one-pass", "one-pass-patches"), "auto", "auto")


@pytest.mark.parametrize("distill", DISTILLERS)
@pytest.mark.parametrize("learner", LEARNERS)
def test_a_pair_is_taken_or_refused_with_a_reason(learner, distill):
    kind = DISTILLERS[distill]
    if learner == "frozen" and distill != "none":
        refused(*("--learner frozen",), learner=learner, distill=distill)
        return
    if kind.works_with(LEARNERS[learner]):
        TrainConfig.from_json({**BASE, "learner": learner, "distill": distill})
        return
    words = (f"--distill {distill}", f"--learner {learner}", kind.refusal)
    refused(*words, learner=learner, distill=distill)
    assert len(kind.refusal) > 20


def test_every_prompt_learner_works_with_what_the_papers_compare():
    for distill in ("none", "kd", "dkd", "fitnets", "reviewkd", "kd-token", "kdp", "blockwise", "m2kd"):
        for learner in ("l2p", "dualprompt", "coda", "apt"):
            TrainConfig.from_json({**BASE, "learner": learner, "distill": distill})


def test_every_option_has_its_line():
    # STYLE: a string under each field, which is what --help and the docs are written from.
    import ast
    import inspect

    body = ast.parse(inspect.getsource(TrainConfig)).body[0].body
    for node, after in itertools.pairwise(body):
        if isinstance(node, ast.AnnAssign):
            assert isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant), node.target.id


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"exemplars": 2, "distill": "kdp"}, ["--exemplars is of M2KD", "--distill m2kd"]),
        ({"exemplars": 2, "distill": "m2kd", "learner": "apt", "head": "ranpac"}, ["--head ranpac", "--head learned"]),
        ({"retrain_epochs": 1, "distill": "kdp"}, ["--retrain-epochs", "--distill m2kd --learner finetune"]),
        ({"retrain_epochs": 1, "distill": "m2kd", "learner": "apt"}, ["a whole network", "--learner apt"]),
        ({"pruned": "zero", "distill": "m2kd", "learner": "apt"}, ["--pruned is of M2KD", "--learner finetune"]),
        ({"pruned": "zeros", "distill": "m2kd", "learner": "finetune"}, ["did you mean 'zero'?"]),
        ({"exemplars": -1}, ["--exemplars is out of range"]),
        ({"apt_momentum": 1.5}, ["--apt-momentum is out of range", "0 to 1"]),
    ],
)
def test_options_that_have_no_meaning_are_refused(change, words):
    refused(*words, **change)


@pytest.mark.parametrize("learner", ["coda", "finetune", "frozen"])
def test_a_head_that_would_never_learn_is_refused(learner):
    """Learnt heads learn when prompts do: the classes of later tasks were answered by their initial values."""
    options = {"learner": learner, "head": "learned", "distill": "none", "prompt_tasks": 1}
    config = TrainConfig.from_json({**BASE, **options})
    with pytest.raises(InputError, match="--prompt-tasks 1") as info:
        config.check_tasks(3)
    assert "--prompt-tasks 3" in str(info.value) and "--head ranpac" in str(info.value)
    config.check_tasks(1)
    replace(config, prompt_tasks=None).check_tasks(3)
    replace(config, prompt_tasks=3).check_tasks(3)
    if learner == "coda":
        replace(config, head="ranpac").check_tasks(3)


def test_options_of_m2kd():
    for change in (
        {"exemplars": 3, "learner": "apt", "head": "learned"},
        {"learner": "finetune", "retrain_epochs": 2, "pruned": "zero"},
    ):
        TrainConfig.from_json({**BASE, "distill": "m2kd", **change})


def test_a_run_of_before_is_read_as_what_it_was():
    old = {**BASE, "learner": "apt", "compat": True}
    assert TrainConfig.from_json(old).as_authors and not TrainConfig.stored(old).as_authors
    plain = TrainConfig.stored({**BASE, "learner": "apt"})
    before = {"head": "learned", "min_steps": 0, "decoder": 1, "token_weight": 1.0}
    assert plain == TrainConfig.from_json({**BASE, "learner": "apt", **before}) and plain.apt_momentum == 0.7
    again = TrainConfig.from_json(old)
    assert TrainConfig.stored(again.to_json()) == again


def test_a_stored_run_has_the_weight_of_tokens_of_its_time():
    assert TrainConfig.stored(BASE).token_weight == 1
    assert TrainConfig.stored(TrainConfig.from_json(BASE).to_json()).token_weight == 0.5
    refused("--token-weight", "above 0", token_weight=0.0)


def test_a_stored_run_without_a_decoder_rule_has_the_first():
    assert TrainConfig.stored(BASE).decoder == 1
    assert TrainConfig.stored({**BASE, "decoder": 2}).decoder == 2
    assert TrainConfig.from_json(BASE).decoder == 2
    refused("decoder rule", "upgrade", decoder=3)


@pytest.mark.parametrize(
    ("options", "learner", "distill"),
    [
        ({}, "frozen", "none"),
        ({"distill": "none"}, "frozen", "none"),
        ({"head": "slda"}, "frozen", "none"),
        ({"tasks": 5, "batch_size": 8}, "frozen", "none"),
        ({"distill": "kd"}, "coda", "kd"),
        ({"head": "learned"}, "coda", "kdp"),
        ({"teacher": "file:other.safetensors"}, "coda", "kdp"),
        ({"epochs": 3}, "coda", "kdp"),
        ({"compat": True}, "coda", "kdp"),
        ({"epochs": 3, "distill": "none"}, "coda", "none"),
        ({"epochs": 3, "learner": "frozen"}, "frozen", "none"),
    ],
)
def test_prompts_learn_where_an_option_asks_for_them(options, learner, distill):
    config = TrainConfig("digits", "x", **options)
    assert (config.learner, config.distill) == (learner, distill)
    assert TrainConfig.from_json(config.to_json()) == config


def test_options_that_change_nothing_are_named():
    def idle(**options):
        return sorted(TrainConfig(data="digits", out="x", **options).without_effect)

    assert idle() == idle(learner="coda", distill="kdp", teacher="x", kd_length=4, epochs=3, augment="none") == []
    assert idle(learner="coda", distill="none", teacher="x", tau=3.0) == ["tau", "teacher"]
    assert idle(batch_size=8) == idle(learner="frozen", batch_size=8) == ["batch_size"]
    assert idle(learner="frozen", head="learned", epochs=3, learning_rate=0.1) == []
    assert idle(learner="frozen", epochs=3, learning_rate=0.1) == ["epochs", "learning_rate"]
    assert idle(learner="apt", query="one-pass", compat=True) == ["query"]
    assert idle(learner="coda", query_regulariser=0.1, apt_momentum=0.8) == ["apt_momentum", "query_regulariser"]
    assert idle(learner="coda", distill="kd", kd_blocks=3, kd_head="linear") == ["kd_blocks", "kd_head"]


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff"])
def test_a_damaged_config_of_a_run_is_named(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(InputError, match="damaged run"):
        TrainConfig.read(tmp_path / "config.json")

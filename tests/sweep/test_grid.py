"""Which cells a sweep has, and what is refused before anything runs."""

import pytest

from cdl_edge.errors import InputError
from cdl_edge.sweep import presets
from cdl_edge.sweep.grid import differing, make_plan
from cdl_edge.train.config import TrainConfig
from cdl_edge.train.distill import DISTILLERS


def refused(tmp_path, *words, **options):
    with pytest.raises(InputError) as caught:
        make_plan(tmp_path / "s", {"data": "digits", **options})
    for word in words:
        assert word in str(caught.value)


def names(plan):
    return [c.name for c in plan.cells]


def test_cells_in_order(plan_of):
    plan = plan_of(learners="l2p,apt", distillers=["none", "kdp"], seeds=[3, 1], epochs=2)
    assert names(plan) == [
        *("l2p-none-3", "l2p-kdp-3", "apt-none-3", "apt-kdp-3"),
        *("l2p-none-1", "l2p-kdp-1", "apt-none-1", "apt-kdp-1"),
    ]
    cell = plan.cells[1]
    assert cell.config == TrainConfig(
        data="digits",
        out=str(plan.out / "runs" / "l2p-kdp-3"),
        learner="l2p",
        distill="kdp",
        seed=3,
        epochs=2,
        teachers=str(plan.out / "teachers"),
    )
    assert cell.needs_teacher and not plan.cells[0].needs_teacher
    assert cell.group == plan.cells[0].group != plan.cells[2].group
    assert plan.baseline == "none"


def test_defaults_of_lists(plan_of):
    plan = plan_of()
    assert plan.learners == ("l2p", "dualprompt", "coda", "apt")
    assert (plan.distillers, plan.queries, plan.seeds) == (("none", "kd", "kdp"), ("two-pass",), (0, 1, 2))
    assert len(plan.cells) == 4 * 3 * 3
    assert plan_of(distillers="kdp,kd").baseline == "kdp"
    assert plan_of(distillers="kdp,kd", baseline="kd").baseline == "kd"


def test_a_learner_without_a_query_is_not_run_twice(plan_of):
    plan = plan_of(learners="coda,apt", distillers="none", queries="two-pass,one-pass", seeds=0)
    assert names(plan) == ["coda-none-0", "coda-none-one-pass-0", "apt-none-0"]
    assert [(r.learner, r.query) for r in plan.refused] == [("apt", "one-pass")]
    assert "no query" in plan.refused[0].reason
    assert names(plan_of(learners="apt", distillers="none", queries="one-pass", seeds=0)) == ["apt-none-one-pass-0"]


def test_what_train_refuses_is_left_out_once(plan_of):
    plan = plan_of(learners="l2p,apt", distillers="none,cdl-prompt", seeds="0,1")
    assert names(plan) == [f"{name}-{seed}" for seed in (0, 1) for name in ("l2p-none", "l2p-cdl-prompt", "apt-none")]
    assert [(r.learner, r.distiller) for r in plan.refused] == [("apt", "cdl-prompt")]
    assert "\n" not in plan.refused[0].reason and "apt" in plan.refused[0].reason


def test_a_head_that_would_never_learn_is_left_out(plan_of):
    plan = plan_of(learners="apt", distillers="none", heads="learned,ranpac", seeds=0, tasks=3, prompt_tasks=2)
    assert [c.config.head for c in plan.cells] == ["ranpac"]
    assert [r.head for r in plan.refused] == ["learned"] and "--prompt-tasks 2" in plan.refused[0].reason


MATRIX = "none,two-heads,kd,kd-token,kdp"


def test_heads_vary_like_learners(plan_of):
    plan = plan_of(learners="frozen,l2p,apt", distillers=MATRIX, heads="learned,slda,ranpac", seeds="0,1")
    cells = {c.name: c.config for c in plan.cells}
    # Every learner with every distiller and head; a backbone that learns nothing has nothing that could be taught.
    assert len(cells) == 2 * 3 * (1 + 5 + 5)
    assert {(r.learner, r.distiller) for r in plan.refused} == {("frozen", d) for d in MATRIX.split(",")[1:]}
    # The head that train takes by itself is not named: a sweep that begins without --heads may get more of them.
    assert cells["l2p-kdp-0"].head == "ranpac" and cells["l2p-kdp-learned-1"].head == "learned"
    assert cells["frozen-none-slda-0"].head == "slda"
    assert plan.heads == ("learned", "slda", "ranpac")
    # A teacher has its student's head.
    groups = {c.group for c in plan.cells if c.config.learner == "apt" and c.config.seed == 0}
    assert len(groups) == 3


def test_one_head_by_two_names_is_one_cell(plan_of):
    plan = plan_of(learners="apt,finetune", distillers="none", heads="auto,ranpac,learned", seeds="0")
    assert names(plan) == ["apt-none-0", "apt-none-learned-0", "finetune-none-0"]
    assert [(r.learner, r.head) for r in plan.refused] == [("finetune", "ranpac")]
    assert plan_of(compat=True, seeds="0", learners="apt", distillers="none").heads == ("learned",)


def test_nothing_left(tmp_path):
    refused(tmp_path, "no combination", "apt", learners="apt", distillers="cdl-prompt")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"learners": "l2p,coad"}, ("unknown learner", "coda")),
        ({"distillers": "none,kpd"}, ("unknown distiller", "kdp")),
        ({"queries": "three-pass"}, ("unknown query", "one-pass")),
        ({"seeds": "0,x"}, ("--seeds is no list of numbers", "0,1,2")),
        ({"seeds": "-1"}, ("--seeds is out of range",)),
        ({"seeds": ""}, ("--seeds",)),
        ({"learners": []}, ("--learners is no list",)),
        ({"learners": 3}, ("--learners is no list",)),
        ({"learners": "l2p,l2p"}, ("--learners names something twice",)),
        ({"seeds": "1,1"}, ("--seeds names something twice",)),
        ({"baseline": "kdp", "distillers": "none,kd"}, ("unknown baseline", "'kdp'", "kd, none")),
        ({"preset": "paper-cifar10"}, ("unknown preset", "did you mean 'paper-cifar100'?")),
        ({"heads": "ranpak"}, ("unknown head", "did you mean 'ranpac'?")),
        ({"head": "ranpac"}, ("unknown sweep option", "did you mean 'heads'?")),
        ({"learner": "l2p"}, ("unknown sweep option", "did you mean 'learners'?")),
        ({"epochs": 0}, ("--epochs is too small",)),
        ({"epochs": "3"}, ("'epochs' has the wrong type",)),
    ],
)
def test_bad_options(tmp_path, options, words):
    refused(tmp_path, *words, **options)


def test_data_is_needed(tmp_path):
    with pytest.raises(InputError, match="data"):
        make_plan(tmp_path, {})
    with pytest.raises(InputError, match="imagenet-r:PATH"):
        make_plan(tmp_path, {"preset": "paper-imagenet-r"})


def test_teachers_may_lie_elsewhere(plan_of):
    assert plan_of(teachers="/elsewhere").cells[0].config.teachers == "/elsewhere"


# -- presets ----------------------------------------------------------------------------------------------------------


def test_published_figures():
    cifar, imagenet = presets.paper_cifar100(), presets.paper_imagenet_r()
    for preset in (cifar, imagenet):
        assert preset.published.keys() == {
            (p, le) for p in ("vitb-vits", "vitl-vitb") for le in ("l2p", "dualprompt", "coda", "apt")
        }
        for figures in preset.published.values():
            assert list(figures) == ["none", "best other KD", "kdp"]
            # In every row of the paper KDP is the best.
            assert figures["kdp"][0] > figures["best other KD"][0] > figures["none"][0]
    assert cifar.published["vitb-vits", "coda"]["kdp"] == (84.31, 5.63)
    assert cifar.published["vitl-vitb", "l2p"]["none"] == (83.02, 6.06)
    assert imagenet.published["vitb-vits", "dualprompt"]["best other KD"] == (66.20, 5.93)
    assert imagenet.published["vitl-vitb", "apt"]["kdp"] == (79.83, 3.87)
    assert (cifar.settings["epochs"], imagenet.settings["epochs"]) == (20, 35)


def test_tags_are_published_ones():
    timm = pytest.importorskip("timm")
    for tag in (presets.VIT_S, presets.VIT_B, presets.VIT_L):
        assert tag in timm.list_pretrained(tag.split(".")[0] + ".*")


def test_preset(plan_of):
    plan = plan_of(data="cifar100", preset="paper-cifar100", seeds="0")
    assert plan.learners == ("coda", "dualprompt", "l2p", "apt")
    assert (plan.distillers[0], plan.distillers[-1]) == ("none", "kdp")
    assert {d for d in plan.distillers if d != "none"} == {d for d, kind in DISTILLERS.items() if kind.needs_teacher}
    assert names(plan)[0] == "vitb-vits-coda-none-learned-0"
    first = next(c for c in plan.cells if c.name == "vitl-vitb-apt-kdp-learned-0").config
    assert (first.teacher, first.student) == (presets.VIT_L, presets.VIT_B)
    assert (first.tasks, first.batch_size, first.epochs, first.learning_rate) == (10, 64, 20, 1e-3)
    assert plan.departures == ()
    assert plan_of(data="cifar100", preset="paper-cifar100", compat=True, seeds="0").departures == ()


def test_preset_with_other_settings(plan_of):
    plan = plan_of(preset="paper-imagenet-r", data="folder:x", epochs=3, limit_per_class=5, learners="l2p", seeds="0")
    assert plan.learners == ("l2p",) and plan.cells[0].config.epochs == 3
    lists, *others = plan.departures
    assert "two fixed lists" in lists  # what cannot be had is said, whatever the options
    assert others == ["epochs 3 (there 35)", "limit-per-class 5 (there None)", "data folder:x"]
    assert plan.cells[0].config.apt_momentum == 0.8


def test_another_kd_head_is_a_setting_of_all_cells_and_a_departure(plan_of, tmp_path):
    plan = plan_of(data="cifar100", preset="paper-cifar100", seeds="0", kd_head="normalised")
    assert {c.config.kd_head for c in plan.cells} == {"normalised"}
    assert plan.departures == ("kd-head normalised (there learner)",)
    refused(tmp_path, "unknown KD head", "did you mean 'linear'?", kd_head="liner")


def test_a_pair_of_a_preset_is_chosen_by_its_backbones(plan_of):
    options = {"data": "cifar100", "preset": "paper-cifar100", "seeds": "0"}
    plan = plan_of(**options, teacher=presets.VIT_L, student=presets.VIT_B)
    assert [p.name for p in plan.pairs] == ["vitl-vitb"] and plan.departures == ()
    plan = plan_of(**options, teacher="file:a", student="file:b")
    assert [(p.name, p.teacher, p.student) for p in plan.pairs] == [("vitb-vits", "file:a", "file:b")]
    assert plan.departures == ("vitb-vits: file:a -> file:b",)
    plan = plan_of(**options, student="file:b")
    assert [p.name for p in plan.pairs] == ["vitb-vits", "vitl-vitb"]
    assert {p.student for p in plan.pairs} == {"file:b"}


# -- other options ----------------------------------------------------------------------------------------------------


def test_differing_options():
    mine = TrainConfig(data="digits", out="a", epochs=3)
    assert differing(mine, TrainConfig(data="digits", out="b", epochs=3, devices="cpu", teachers="t")) == ""
    # What was left to train comes back as the number it came to.
    assert differing(mine, TrainConfig(data="digits", out="a", epochs=3, tasks=5, tau=2.0)) == ""
    assert differing(mine, TrainConfig(data="digits", out="a", epochs=4)) == "epochs=4 (now 3)"
    asked = TrainConfig(data="digits", out="a", tasks=4)
    assert differing(asked, TrainConfig(data="digits", out="a", tasks=5)) == "tasks=5 (now 4)"


@pytest.mark.parametrize(
    ("learner", "options"),
    [("coda", {"exemplars": 5, "heads": "learned"}), ("finetune", {"retrain_epochs": 2, "pruned": "zero"})],
)
def test_options_of_one_method_go_into_a_sweep_of_it(plan_of, learner, options):
    """They were refused, because the settings were looked at beside the default learner and distiller."""
    plan = plan_of(learners=learner, distillers="none,m2kd", seeds=0, **options)
    assert names(plan) == [f"{learner}-m2kd-{'learned-' if learner == 'coda' else ''}0"]
    assert plan.settings["exemplars"] == options.get("exemplars", 0)
    assert [(r.distiller, "is of M2KD" in r.reason) for r in plan.refused] == [("none", True)]


def test_an_option_that_no_cell_can_have_is_refused_as_before(tmp_path):
    refused(tmp_path, "--exemplars is of M2KD", learners="coda", distillers="kd", exemplars=5)
    refused(tmp_path, "--epochs is too small", epochs=0)

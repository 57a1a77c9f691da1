"""The prompted ViT against timm, against a second implementation, and against what must not happen in it."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch import nn

from cdl_edge.train import student as student_module
from cdl_edge.train.augment import Normalise, random_boxes
from cdl_edge.train.batches import Pipeline, TaskImages
from cdl_edge.train.student import LinearHead, ModelSpec, NormalisedHead, PromptedViT, StudentOutput, run_block

LEARNERS = ("l2p", "dualprompt", "coda", "apt")


@pytest.mark.quick("l2p-True-False", "dualprompt-False-False", "coda-True-True", "apt-True-False")
@pytest.mark.parametrize("one_pass", [False, True])
@pytest.mark.parametrize("kd", [True, False])
@pytest.mark.parametrize("learner", LEARNERS)
def test_logits_equal_the_plain_formulas(make_model, backbone, naive, pixels, learner, kd, one_pass):
    model = make_model(learner, kd=kd, one_pass=one_pass)
    normalise = Normalise(backbone.preprocessing, torch.device("cpu"))
    with torch.no_grad():
        got = model.combine(model(model.embed(normalise(pixels[:2])))).numpy()
    plain = naive(model, backbone, learner)
    expected = np.stack([plain.logits(p) for p in pixels[:2]])
    assert np.abs(expected).max() > 0.1 and np.abs(expected[0] - expected[1]).max() > 0.01
    assert np.abs(got - expected).max() <= 1e-5


@pytest.mark.parametrize(
    ("learner", "kd_head", "kinds"),
    [
        ("coda", "learner", (LinearHead, LinearHead)),
        ("apt", "learner", (NormalisedHead, NormalisedHead)),
        ("coda", "normalised", (LinearHead, NormalisedHead)),
        ("apt", "linear", (NormalisedHead, LinearHead)),
    ],
)
def test_the_kd_head_may_be_of_another_kind(make_model, backbone, naive, pixels, learner, kd_head, kinds):
    model, usual = make_model(learner, kd_head=kd_head), make_model(learner)
    assert (type(model.head), type(model.kd_head)) == kinds
    assert torch.equal(model.head.weight, usual.head.weight)  # of the rest, nothing starts from other numbers
    assert torch.equal(model.kd.token, usual.kd.token)
    assert make_model(learner, kd=False, kd_head=kd_head).kd_head is None
    model.alpha = 0.3
    normalise = Normalise(backbone.preprocessing, torch.device("cpu"))
    with torch.no_grad():
        got = model.combine(model(model.embed(normalise(pixels[:2])))).numpy()
    plain = naive(model, backbone, learner)
    assert np.abs(got - np.stack([plain.logits(p) for p in pixels[:2]])).max() <= 1e-5


@pytest.mark.quick("l2p-True", "coda-False")
@pytest.mark.parametrize("kd", [True, False])
@pytest.mark.parametrize("learner", ["l2p", "dualprompt", "coda"])
def test_the_patches_as_the_query(make_model, backbone, naive, pixels, learner, kd):
    model = make_model(learner, kd=kd, one_pass=True, query_of="patches")
    normalise = Normalise(backbone.preprocessing, torch.device("cpu"))
    with torch.no_grad():
        tokens = model.embed(normalise(pixels[:2]))
        output, other = model(tokens), make_model(learner, kd=kd, one_pass=True)(tokens)
        difference = (output.prompt_weights - other.prompt_weights).nan_to_num()  # what may not be chosen is -inf
        assert difference.abs().max() > 1e-2
        got = model.combine(output).numpy()
    plain = naive(model, backbone, learner)
    assert np.abs(got - np.stack([plain.logits(p) for p in pixels[:2]])).max() <= 1e-5


@pytest.mark.parametrize("learner", LEARNERS)
def test_every_part_matters(make_model, tokens, learner):
    # Otherwise the comparison above proves little.
    model = make_model(learner)
    names = [n for n, _ in model.named_parameters() if not (learner == "apt" and n == "learner.prompt")]
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    with torch.no_grad():
        before = model.combine(model(tokens))
        for name in (*names, *(["learner.merged"] if learner == "apt" else [])):
            part, kept = tensors[name], tensors[name].clone()
            # A key that moves a little may select the same entries; the opposite one does not.
            change = (
                -2 * kept if ".key" in name else torch.randn(part.shape, generator=torch.Generator().manual_seed(0))
            )
            part.add_(change)
            assert (model.combine(model(tokens)) - before).abs().max() > 1e-4, name
            part.copy_(kept)


def test_the_bare_query_is_timms_class_token(make_model, backbone, tokens, pixels):
    normalise = Normalise(backbone.preprocessing, torch.device("cpu"))
    with torch.no_grad():
        features = backbone.model.forward_features(normalise(pixels))
    assert (make_model("coda").query(tokens) - features[:, 0]).abs().max() <= 1e-5


def test_a_pass_without_prompts_is_timms_class_token(make_model, backbone, tokens, pixels):
    model = make_model("apt", learnt=0, kd=False)  # the merged prompt is zero before the first task
    normalise = Normalise(backbone.preprocessing, torch.device("cpu"))
    with torch.no_grad():
        features = backbone.model.forward_features(normalise(pixels))[:, 0]
        assert (model(tokens).cls_logits - model.head(features)).abs().max() <= 1e-5


@pytest.mark.parametrize("keep", [[0], [0, 4], [2, 1]])
def test_the_rows_kept_are_those_of_the_whole_block(make_model, backbone, tokens, keep):
    model = make_model("coda")
    block = backbone.model.blocks[3]
    with torch.no_grad():
        prompt = model.learner.at_block(3, model.query(tokens), training=False)
        rows = model.kd.at_block(3)
        whole = run_block(block, tokens, prompt, rows)
        assert (run_block(block, tokens, prompt, rows, keep) - whole[:, keep]).abs().max() <= 1e-5
        assert (run_block(block, tokens) - block(tokens)).abs().max() <= 1e-5


@pytest.mark.parametrize("learner", LEARNERS)
def test_the_backbone_keeps_no_gradient(make_model, backbone, tokens, learner):
    model = make_model(learner)
    output = model(tokens, training=True)
    (output.cls_logits.sum() + output.kd_logits.sum()).backward()
    assert all(p.grad is None and not p.requires_grad for p in backbone.model.parameters())
    assert not backbone.model.training and not any(m.training for m in backbone.model.modules())
    assert model.head.weight.grad.abs().sum() > 0 and model.kd.rows.grad.abs().sum() > 0


def test_the_backbone_is_neither_trained_nor_saved(make_model, backbone):
    model = make_model("coda")
    ids = {id(p) for p in backbone.model.parameters()}
    assert not ids & {id(p) for p in model.parameters()}
    assert not ids & {id(p) for p in model.trainable()}
    assert sum(v.numel() for v in model.state_dict().values()) == sum(
        v.numel() for m in (model.learner, model.kd, model.head, model.kd_head) for v in m.state_dict().values()
    )


def test_the_query_pass_builds_no_graph(make_model, tokens):
    model = make_model("coda")
    assert not model.query(tokens.clone().requires_grad_()).requires_grad
    assert not model.embed(torch.zeros(1, 3, 16, 16, requires_grad=True)).requires_grad


@pytest.mark.parametrize("learner", LEARNERS)
@pytest.mark.parametrize("one_pass", [False, True])
def test_a_prediction_does_not_depend_on_its_batch_mates(make_model, backbone, pixels, learner, one_pass):
    model = make_model(learner, one_pass=one_pass)
    normalise = Normalise(backbone.preprocessing, torch.device("cpu"))
    with torch.no_grad():
        together = model(model.embed(normalise(pixels)))
        for i in range(len(pixels)):
            alone = model(model.embed(normalise(pixels[i : i + 1])))
            assert (model.combine(alone)[0] - model.combine(together)[i]).abs().max() <= 1e-5
            if alone.prompt_weights is not None:
                both = (alone.prompt_weights[0], together.prompt_weights[i])
                assert torch.allclose(*both, atol=1e-5)
                assert torch.equal(both[0].topk(1).indices, both[1].topk(1).indices)


def test_two_heads_are_mixed_by_alpha(make_model):
    model = make_model("coda")
    model.alpha = 0.25
    cls, kd = torch.tensor([[4.0, 0.0]]), torch.tensor([[0.0, 8.0]])
    assert model.combine(StudentOutput(cls, kd, None, None)).tolist() == [[3.0, 2.0]]
    assert model.combine(StudentOutput(cls, None, None, None)) is cls


def test_the_kd_token_is_last_and_has_no_position(make_model, tokens, monkeypatch):
    model = make_model("apt")
    seen = []
    real = run_block

    def watch(block, x, *rest):
        seen.append(x.detach())
        return real(block, x, *rest)

    monkeypatch.setattr(student_module, "run_block", watch)
    model(tokens)
    assert torch.equal(seen[0][:, :-1], tokens)
    assert torch.equal(seen[0][:, -1], model.kd.token[0].expand(5, -1))
    assert [x.shape[1] for x in seen] == [6] * 6


def test_kd_rows_are_in_every_block_but_the_first(make_model):
    kd = make_model("coda").kd
    assert kd.at_block(0) is None and kd.at_block(6) is None
    for i in range(1, 6):
        keys, values = kd.at_block(i)
        assert torch.equal(keys[0], kd.rows[i - 1, :3]) and torch.equal(values[0], kd.rows[i - 1, 3:])


@pytest.mark.parametrize(("kd", "rows"), [((1, 6), 0), ((3, 2), 2), ((99, 6), 5), ((6, 0), 5)])
def test_fewer_or_no_kd_rows(backbone, tokens, kd, rows):
    # (6, 0) is the "KD token" variant: the token alone.
    model = PromptedViT(backbone.model, ModelSpec("apt", 4, 2, 0, kd=kd))
    assert len(model.kd.rows) == rows
    output = model(tokens)
    assert output.kd_logits.shape == (5, 4)


# -- tokens behind and in front of blocks -----------------------------------------------------------------------------


@pytest.mark.parametrize("kd", [True, False])
@pytest.mark.parametrize("learner", LEARNERS)
def test_hidden_tokens_are_those_behind_each_block(make_model, backbone, tokens, learner, kd, monkeypatch):
    model = make_model(learner, kd=kd)
    query = model.query(tokens)  # the bare pass is not watched
    seen = []
    real = run_block
    watch = lambda *arguments: seen.append(real(*arguments)) or seen[-1]  # noqa: E731
    monkeypatch.setattr(student_module, "run_block", watch)
    with torch.no_grad():
        output, usual = model(tokens, query, hidden=True), model(tokens, query)
        assert len(output.hidden) == 6 and usual.hidden == ()
        for i, hidden in enumerate(output.hidden):
            assert hidden.shape == tokens.shape and torch.equal(hidden, seen[i][:, :5])  # without the KD token
        last = backbone.model.norm(output.hidden[-1])[:, 0]
        assert torch.allclose(model.head(last), output.cls_logits, atol=1e-5)
        assert torch.allclose(model.combine(output), model.combine(usual), atol=1e-5)


@pytest.mark.parametrize("one_pass", [False, True])
@pytest.mark.parametrize("learner", LEARNERS)
def test_a_pass_may_start_in_the_middle(make_model, tokens, learner, one_pass):
    model = make_model(learner, kd=False, one_pass=one_pass)
    with torch.no_grad():
        query = None if one_pass else model.query(tokens)
        whole = model(tokens, query, hidden=True)
        for start in (1, 3, 5):
            part = model(whole.hidden[start - 1], query, start=start, hidden=True)
            assert torch.allclose(part.cls_logits, whole.cls_logits, atol=1e-5)
            assert len(part.hidden) == 6 - start


# -- the one-pass regulariser -----------------------------------------------------------------------------------------


def cosines(model, learner, block, q):
    """Of one query to each entry in use, by hand."""

    def cos(a, b):
        return float((a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum()))

    own = {k: v.detach().double().numpy() for k, v in model.learner.state_dict().items()}
    if learner == "l2p":
        return [cos(q, key) for key in own["key"]]
    if learner == "dualprompt":
        return [cos(q, key) for key in own[f"key.{block}"][:2]]
    return [cos(q * own[f"attention.{block}"][k], own[f"key.{block}"][k]) for k in range(66)]


@pytest.mark.parametrize("learner", ["l2p", "dualprompt", "coda"])
def test_the_regulariser_is_the_published_sum(make_model, tokens, learner, monkeypatch):
    model = make_model(learner, one_pass=True)
    reference = torch.randn(5, 16, generator=torch.Generator().manual_seed(4))
    without = model(tokens, reference, training=True).key_loss
    asked = {}
    real = model.learner.at_block
    monkeypatch.setattr(
        model.learner, "at_block", lambda b, q, t: asked.update({b: q.detach().double().numpy()}) or real(b, q, t)
    )
    model.query_regulariser = 0.3
    got = model(tokens, reference, training=True).key_loss
    assert list(asked) == list(range(6))
    expected = 0.0
    for block in model.learner.blocks():
        for own, full in zip(asked[block], reference.double().numpy(), strict=True):
            one, two = (np.exp(cosines(model, learner, block, q)) for q in (own, full))
            expected += 0.3 * float(((one / one.sum() - two / two.sum()) ** 2).sum()) / 5
    assert expected > 1e-5
    # Beside the key loss, which stays what it is.
    assert got.item() - (without.item() if without is not None else 0.0) == pytest.approx(expected, rel=1e-3)
    got.backward()
    name = "key" if learner == "l2p" else "key.2"
    assert dict(model.learner.named_parameters())[name].grad.abs().sum() > 0


@pytest.mark.parametrize("learner", ["l2p", "dualprompt", "coda"])
def test_inference_knows_no_regulariser(make_model, tokens, learner):
    model = make_model(learner, one_pass=True)
    reference = torch.randn(5, 16, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        before = model(tokens)
        model.query_regulariser = 100.0
        after, asked = model(tokens), model(tokens, reference)
    assert not model.two_pass and after.key_loss is None and asked.key_loss is None
    for other in (after, asked):
        assert torch.equal(model.combine(before), model.combine(other))
    model.query_regulariser = 0.0
    assert not model.reads_reference
    two_pass, apt = make_model(learner), make_model("apt", one_pass=True)
    for other in (two_pass, apt):
        other.query_regulariser = 1.0
        assert not other.reads_reference


# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_teachers_keys_have_the_students_width(tiny_vit, backbone, make_model, tokens, pixels):
    from cdl_edge.train.backbone import load_backbone

    wide = load_backbone(tiny_vit("teacher", 24))
    for learner in ("l2p", "dualprompt", "coda"):
        teacher = PromptedViT(wide.model, ModelSpec(learner, 6, 3, 1, key_width=backbone.width))
        teacher.learner.begin_task(0)
        own = Normalise(wide.preprocessing, torch.device("cpu"))
        output = teacher(teacher.embed(own(pixels)), make_model("coda").query(tokens))
        assert output.cls_logits.shape == (5, 6)
        one_pass = PromptedViT(wide.model, ModelSpec(learner, 6, 3, 1, key_width=backbone.width, one_pass=True))
        assert one_pass.learner.spec.key_width == 24  # its query is its own class token


def test_a_seed_fixes_the_start_and_leaves_the_global_generator_alone(backbone):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one = PromptedViT(backbone.model, ModelSpec("coda", 6, 3, 7, kd=(6, 6)))
    one.learner.begin_task(0)
    assert torch.equal(torch.rand(3), expected)
    two = PromptedViT(backbone.model, ModelSpec("coda", 6, 3, 7, kd=(6, 6)))
    two.learner.begin_task(0)
    for (name, a), b in zip(one.state_dict().items(), two.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    other = PromptedViT(backbone.model, ModelSpec("coda", 6, 3, 8, kd=(6, 6)))
    assert not torch.equal(one.head.weight, other.head.weight)


def test_heads_fold_to_what_they_compute():
    torch.manual_seed(0)
    x = torch.randn(3, 8)
    for head in (LinearHead(8, 5), NormalisedHead(8, 5), NormalisedHead(8, 5, compat=True)):
        for p in head.parameters():
            p.data += torch.randn_like(p)
        weight, bias, norm = head.folded()
        y = x if norm is None else nn.functional.layer_norm(x, (8,), norm[0], norm[1], norm[2])
        assert torch.allclose(head(x), y @ weight.t() + bias, atol=1e-5)
    assert torch.allclose(NormalisedHead(8, 5).folded()[0].norm(dim=1), torch.ones(5))


@pytest.mark.parametrize("learner", LEARNERS)
def test_counts_survive_a_reload(make_model, tokens, learner):
    # Trap 6: elsewhere a reloaded CODA student uses the first task's components only.
    model = make_model(learner, learnt=2)
    fresh = make_model(learner, learnt=0, seed=99)
    fresh.load_state_dict(model.state_dict())
    assert fresh.learner.learnt == 2
    with torch.no_grad():
        one, two = model(tokens), fresh(tokens)
    assert torch.equal(model.combine(one), fresh.combine(two))
    if one.prompt_weights is not None:
        assert torch.equal(one.prompt_weights, two.prompt_weights)


def test_the_key_loss_is_a_mean(make_model, tokens):
    # Trap 3: a loss that is summed over parts grows with the number of devices or with the batch.
    for learner in ("l2p", "dualprompt"):
        model = make_model(learner)
        with torch.no_grad():
            whole = model(tokens[:4], training=True).key_loss
            parts = [model(tokens[i : i + 1], training=True).key_loss for i in range(4)]
        assert whole.ndim == 0 and whole.item() == pytest.approx(sum(p.item() for p in parts) / 4, rel=1e-5)
        assert model(tokens).key_loss is None
    for learner in ("coda", "apt"):
        assert make_model(learner)(tokens, training=True).key_loss is None


def test_prompt_weights_have_the_shape_the_bundle_promises(make_model, tokens):
    shapes = {name: make_model(name, learnt=2)(tokens).prompt_weights for name in LEARNERS}
    assert shapes["l2p"].shape == (5, 1, 30)
    assert shapes["dualprompt"].shape == (5, 3, 2)
    assert shapes["coda"].shape == (5, 5, 66)
    assert shapes["apt"] is None


def test_the_query_is_computed_once_for_teacher_and_student(tiny_vit, backbone, make_model, monkeypatch):
    # Trap 5: it is the same computation for both.
    from cdl_edge.data import Split
    from cdl_edge.train.backbone import load_backbone

    wide = load_backbone(tiny_vit("teacher", 24))
    student = make_model("coda")
    teacher = PromptedViT(wide.model, ModelSpec("coda", 6, 3, 1, key_width=backbone.width))
    device = torch.device("cpu")
    sides = {
        "student": Pipeline(student, backbone.preprocessing, device),
        "teacher": Pipeline(teacher, wide.preprocessing, device),
    }
    images = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
    counted = []
    real = PromptedViT.query
    monkeypatch.setattr(PromptedViT, "query", lambda self, t: counted.append((self, len(t))) or real(self, t))
    batches = TaskImages(Split(images, np.zeros(6, dtype=np.int64)), sides, device)
    for boxes in (random_boxes(4, torch.Generator().manual_seed(0), (0.5, 1.0)), None):
        if boxes is None:
            batches.keep(["student", "teacher"], nullcontext, 4)
        batch = batches.batch(np.arange(4), ["student", "teacher"], nullcontext, boxes)
        with torch.no_grad():
            student(batch.inputs["student"], batch.queries["student"])
            teacher(batch.inputs["teacher"], batch.queries["teacher"])
        assert all(model is student for model, _ in counted)
        assert sum(n for _, n in counted) == (4 if boxes is not None else 6)
        counted.clear()


@pytest.mark.parametrize("learner", ["apt", "coda"])
def test_heads_and_kd_prompts_as_the_authors_have_them(backbone, learner):
    plain, theirs = (
        PromptedViT(backbone.model, ModelSpec(learner, 4, 2, 0, kd=(6, 6), compat=c)) for c in (False, True)
    )
    for head in (theirs.head, theirs.kd_head):
        assert [n for n, _ in head.named_parameters()] == ["weight", "bias"]  # a LayerNorm that does not learn
        if learner == "apt":
            x = torch.randn(3, 16)
            unit = head.weight / head.weight.norm(dim=1, keepdim=True)
            normed = (x - x.mean(dim=1, keepdim=True)) / (x.var(dim=1, correction=0, keepdim=True) + 1e-5).sqrt()
            assert torch.allclose(head(x), normed @ unit.t() + head.bias, atol=1e-5)
            assert 0 < head.bias.abs().max() <= 0.25
    for values in (theirs.kd.token, theirs.kd.rows):  # U(0, 1)
        assert values.min() >= 0 and values.max() > 0.5 and values.mean().item() == pytest.approx(0.5, abs=0.25)
        assert values.shape in (plain.kd.token.shape, plain.kd.rows.shape)
    assert plain.kd.token.abs().max() < 0.1  # N(0, 0.02)


def test_key_losses_of_the_blocks_are_summed_as_the_authors_do(backbone):
    plain, theirs = (PromptedViT(backbone.model, ModelSpec("dualprompt", 4, 2, 0, compat=c)) for c in (False, True))
    tokens = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for model in (plain, theirs):
            model.learner.begin_task(0)
        losses = [m(tokens, training=True).key_loss.item() for m in (plain, theirs)]
    assert losses[1] == pytest.approx(3 * losses[0], rel=1e-5)

"""The student (and the teacher): a frozen ViT, a prompt learner, optional KD prompts, one or two heads.

This is the module that `export` turns into a graph: what it computes in eval mode is what a bundle must compute.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ..heads import RANDOM_FEATURES
from .attention import output_norm, queries_keys_values
from .closed_form import StatisticsHead
from .learners import LEARNERS, BlockPrompt, Learner, LearnerSpec
from .learners.base import uniform
from .learners.mapped import MappedPrompts
from .tokens import embed, pooled, without_registers


class LinearHead(nn.Linear):
    """A linear head, x W^T + b: features (B, D) -> logits (B, C)."""

    def folded(self) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, float] | None]:
        """Weight (C, D), bias (C,), and the LayerNorm in front of them (weight, bias, eps) or None."""
        return self.weight, self.bias, None


class NormalisedHead(nn.Module):
    """LayerNorm(x) . w / ||w||, no bias (APT). (B, D) -> (B, C).

    compat: the head of the CDL authors' code. Its LayerNorm is not in the optimiser, so it has nothing to learn, and
    it has a bias.
    """

    def __init__(self, width: int, classes: int, compat: bool = False) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=not compat)
        self.weight = nn.Parameter(torch.empty(classes, width))
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)
        self.bias = nn.Parameter(torch.empty(classes).uniform_(-(width**-0.5), width**-0.5)) if compat else None

    def forward(self, x: Tensor) -> Tensor:
        """Features (B, D) -> logits (B, C)."""
        return F.linear(self.norm(x), F.normalize(self.weight, dim=1), self.bias)

    def folded(self) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, float] | None]:
        """Weight and bias of the linear map that gives the same logits; see LinearHead.folded."""
        weight = F.normalize(self.weight, dim=1)
        if self.bias is None:
            return weight, torch.zeros(len(weight)), (self.norm.weight, self.norm.bias, self.norm.eps)
        width = weight.shape[1]
        return weight, self.bias, (torch.ones(width), torch.zeros(width), self.norm.eps)


HEADS: dict[str, Any] = {"linear": LinearHead, "normalised": NormalisedHead}


def make_head(kind: str, width: int, classes: int, compat: bool) -> Any:
    """A new head of a kind in HEADS; compat: as the CDL authors' code has it."""
    more = {"compat": compat} if kind == "normalised" else {}
    return HEADS[kind](width, classes, **more)


SPREAD_EPS = 1e-6
"added to the variance of a channel over the patches: a picture of one colour has none"


def patch_query(tokens: Tensor) -> Tensor:
    """Mean and standard deviation of each channel over the patches, each normalised, added. (B, 1 + P, D) -> (B, D).

    Ours: in the first blocks, where prompts are chosen, the class token has seen little of the image; what its patches
    hold in common and how they differ says more (docs/results.md has the figures).
    """
    spread, mean = torch.var_mean(tokens[:, 1:].float(), dim=1, correction=0)
    shape = tokens.shape[-1:]
    query = F.layer_norm(mean, shape) + F.layer_norm((spread + SPREAD_EPS).sqrt(), shape)
    return query.to(tokens.dtype)


OWN_QUERY: dict[str, Callable[[Tensor], Tensor]] = {"class": lambda tokens: tokens[:, 0], "patches": patch_query}
"tokens that come into a block (B, 1 + P, D), KD token left out -> its query (B, D); class: OS-Prompt"


class KDPrompts(nn.Module):
    """KDP's global prompts: a KD token appended last in block 0, then `length` rows a block, half keys, half values.

    Source: arXiv 2407.13911 (reference setting: 12 blocks, length 6). Initial values N(0, 0.02): ours; compat: U(0, 1),
    the authors'.
    """

    def __init__(self, width: int, blocks: int, length: int, generator: torch.Generator, compat: bool = False) -> None:
        super().__init__()

        def initial(*shape: int) -> nn.Parameter:
            return uniform(shape, generator) if compat else nn.Parameter(torch.randn(shape, generator=generator) * 0.02)

        self.token = initial(1, 1, width)
        self.rows = initial(max(0, blocks - 1), length, width)

    def at_block(self, block: int) -> tuple[Tensor, Tensor] | None:
        """(1, length / 2, D) key rows and value rows of blocks 1..; None elsewhere."""
        if not 1 <= block <= len(self.rows):
            return None
        keys, values = self.rows[block - 1].chunk(2, dim=0)
        return keys[None], values[None]


@dataclass(frozen=True)
class StudentOutput:
    """What one forward pass of a prompted ViT gives."""

    cls_logits: Tensor
    "(B, C) of the head on the class token"
    kd_logits: Tensor | None
    "(B, C) of the head on the KD token"
    key_loss: Tensor | None
    "scalar, only while training a pool learner"
    prompt_weights: Tensor | None
    "(B, L, K), L query-dependent blocks"
    hidden: tuple[Tensor, ...] = ()
    "(B, 1 + P, D) class and patch tokens behind each block, where asked for"
    features: Tensor | None = None
    "float32 (B, 5 D or 6 D) what a head made from statistics reads; only while not training"


@dataclass(frozen=True)
class ModelSpec:
    """What a prompted ViT is built of, beside its backbone."""

    learner: str
    "key of LEARNERS"
    classes: int
    "of all tasks, C"
    tasks: int
    "of the whole scenario, T"
    seed: int
    "of initial values"
    key_width: int | None = None
    "channels of the query, Q; None: the own width"
    kd: tuple[int, int] | None = None
    "blocks and length of the KD prompts; None: there is no KD token"
    alpha: float = 0.5
    "share of the head on the KD token"
    pool_tasks: int = 0
    "see LearnerSpec"
    one_pass: bool = False
    "a block's own input gives the query, in the way `query_of`"
    query_regulariser: float = 0.0
    "weight of the training-only term that ties one-pass selections to those of the full query"
    mapped: tuple[int, int] | None = None
    "width and depth of the teacher whose prompts join the own ones; None: there are none"
    kd_head: str = "learner"
    "key of HEADS, or learner: the kind of the learner's own head"
    query_of: str = "class"
    "key of OWN_QUERY"
    compat: bool = False
    "see LearnerSpec; also of heads, KD prompts and the sum of key losses"
    apt_momentum: float = 0.7
    "see LearnerSpec"
    head: str = "learned"
    "learned, or one of closed_form.statistics_heads(), which then answers in place of the learnt heads"
    random_features: int = RANDOM_FEATURES
    "of `ranpac`"
    token_weight: float = 1.0
    "of `ranpac`, see StatisticsHead"

    def learner_spec(self, width: int, depth: int) -> LearnerSpec:
        """What the learner is built for; width, depth: of the backbone."""
        keys = width if self.one_pass else self.key_width or width
        return LearnerSpec(width, depth, keys, self.tasks, self.seed, self.pool_tasks, self.compat, self.apt_momentum)


class PromptedViT(nn.Module):
    """A backbone with prompts: frozen, so that only `learner`, `mapped`, `kd`, `head` and `kd_head` have what learns.

    A whole-network learner has a backbone of its own instead, which learns and is saved with the run.
    """

    def __init__(self, backbone: VisionTransformer, spec: ModelSpec) -> None:
        """backbone: with the weights of pre-training; it is not copied unless the learner is a whole-network one."""
        super().__init__()
        width, depth = int(backbone.embed_dim), len(backbone.blocks)
        self.alpha, self.one_pass, self.classes = spec.alpha, spec.one_pass, spec.classes
        self.query_regulariser, self.query_of, self.compat = spec.query_regulariser, spec.query_of, spec.compat
        sizes = spec.learner_spec(width, depth)
        self.learner: Learner = LEARNERS[spec.learner](sizes)
        # Held outside the module tree: frozen weights are neither trained, nor saved with the run, nor copied.
        self._pretrained = self._backbone = (backbone,)
        if self.learner.whole_network:
            self.network = copy.deepcopy(backbone).requires_grad_(True)
            self.network.reset_classifier(0)  # pre-training's own classes: nothing reads them
            self._backbone = (self.network,)
        kd, kd_kind = spec.kd, self.learner.head if spec.kd_head == "learner" else spec.kd_head
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(spec.seed)
            self.head = make_head(self.learner.head, width, spec.classes, spec.compat)
            self.kd_head = make_head(kd_kind, width, spec.classes, spec.compat) if kd else None
        generator = torch.Generator().manual_seed(spec.seed)
        self.kd = KDPrompts(width, min(kd[0], depth), kd[1], generator, spec.compat) if kd else None
        self.mapped = MappedPrompts(LEARNERS[spec.learner], sizes, spec.mapped) if spec.mapped else None
        self.statistics_head: StatisticsHead | None = None
        if spec.head != "learned":
            features = spec.random_features, spec.token_weight
            self.statistics_head = StatisticsHead(spec.head, width, bool(kd), spec.classes, *features)

    @property
    def backbone(self) -> VisionTransformer:
        """The ViT, frozen unless the learner is a whole-network one."""
        return self._backbone[0]

    @property
    def pretrained(self) -> VisionTransformer:
        """The ViT as it was given: never trained, and with pre-training's own head."""
        return self._pretrained[0]

    @property
    def two_pass(self) -> bool:
        """Whether inference needs the query pass."""
        return self.learner.needs_query and not self.one_pass

    @property
    def reads_reference(self) -> bool:
        """Whether training wants the full query beside the one-pass one."""
        return self.learner.needs_query and self.one_pass and self.query_regulariser > 0

    @torch.no_grad()
    def prepare(self, x: Tensor) -> Tensor:
        """What `forward` takes, of normalised images (B, 3, S, S): tokens, or the images where the stem learns too."""
        return x if self.learner.whole_network else self._tokens(x)

    @torch.no_grad()
    def embed(self, x: Tensor) -> Tensor:
        """(B, 3, S, S) normalised images -> (B, 1 + R + P, D) tokens with positions, by the backbone as it was given.

        R of them are registers, in most backbones none.
        """
        return self._tokens(x, self.pretrained)

    def _tokens(self, x: Tensor, vit: VisionTransformer | None = None) -> Tensor:
        return embed(vit or self.backbone, x)

    @torch.no_grad()
    def query(self, tokens: Tensor) -> Tensor:
        """The final class token of the bare backbone, (B, 1 + R + P, D) -> (B, D)."""
        vit = self.backbone
        for i, block in enumerate(vit.blocks):
            tokens = run_block(block, tokens, keep=[0] if i == len(vit.blocks) - 1 else None)
        return vit.norm(tokens)[:, 0]

    def forward(
        self, inputs: Tensor, query: Tensor | None = None, training: bool = False, hidden: bool = False, start: int = 0
    ) -> StudentOutput:
        """One prompted pass.

        inputs: from `prepare`. query: (B, Q) from the student's `query`; None: computed here where needed. For a
        one-pass model: its own full query, which only the training-only regulariser reads.
        training: use what the current task learns, with key loss; otherwise what inference uses.
        hidden: keep the tokens behind every block. start: `inputs` are tokens in front of this block (no KD prompts).
        """
        x = self._tokens(inputs) if self.learner.whole_network and start == 0 else inputs
        if self.two_pass and query is None:
            query = self.query(x)
        losses: list[Tensor] = []
        references: list[Tensor] = []
        weights: list[Tensor] = []
        kept: list[Tensor] = []
        count = x.shape[1]
        if self.kd is not None:
            assert start == 0
            x = torch.cat([x, self.kd.token.expand(len(x), -1, -1)], dim=1)
        last = len(self.backbone.blocks) - 1
        for i in range(start, last + 1):
            own = None
            if self.one_pass and self.learner.needs_query:
                own = OWN_QUERY[self.query_of](without_registers(self.backbone, x[:, :count]))
            q = (own if self.one_pass else query) if self.learner.needs_query else None
            prompt = self.learner.at_block(i, q, training)
            if prompt is not None and prompt.loss is not None:
                losses.append(prompt.loss)
            if prompt is not None and prompt.weights is not None:
                weights.append(prompt.weights)
            if self.mapped is not None:
                prompt = self.mapped.beside(i, q, prompt)
            if training and self.reads_reference and q is not None and query is not None:
                term = self.learner.reference_loss(i, q, query)
                references += [term] if term is not None else []
            if i == last and self.statistics_head is not None and not training:
                # In front of the last block, which then answers for one or two rows only.
                patches = self.backbone.norm(x[:, int(self.backbone.num_prefix_tokens) : count])
            rows = None
            if i == last and not hidden:  # only these rows are read behind it
                rows = [0] if self.kd is None else [0, x.shape[1] - 1]
            x = run_block(
                self.backbone.blocks[i], x, prompt, self.kd.at_block(i) if self.kd is not None else None, rows
            )
            if hidden:
                kept.append(without_registers(self.backbone, x[:, :count]))
        x = self.backbone.norm(x)
        features = None
        if self.statistics_head is not None and not training:
            ends = [x[:, 0], x[:, -1]] if self.kd is not None else [x[:, 0]]
            features = torch.cat([*(t.float() for t in ends), pooled(self.backbone, patches)], dim=1)
        # Keys: the mean over blocks (the authors: their sum); the regulariser, as published, the sum over blocks.
        # In bf16 it would be swallowed.
        keys = torch.stack(losses).float() if losses else None
        key_losses = [keys.sum() if self.compat else keys.mean()] if keys is not None else []
        key_losses += [self.query_regulariser * torch.stack(references).float().sum()] if references else []
        return StudentOutput(
            self.head(x[:, 0]),
            self.kd_head(x[:, -1]) if self.kd_head is not None else None,
            torch.stack(key_losses).sum() if key_losses else None,
            torch.stack(weights, dim=1) if weights else None,
            tuple(kept),
            features,
        )

    def combine(self, output: StudentOutput) -> Tensor:
        """Logits (B, C) of the head made from statistics; else (1 - a) head(CLS) + a kd_head(KD token), or of one."""
        if self.statistics_head is not None and output.features is not None:
            return self.statistics_head(output.features)
        if output.kd_logits is None:
            return output.cls_logits
        return (1 - self.alpha) * output.cls_logits + self.alpha * output.kd_logits

    def trainable(self) -> list[nn.Parameter]:
        """The parameters that learn."""
        return [p for p in self.parameters() if p.requires_grad]


def run_block(
    block: nn.Module,
    x: Tensor,
    prompt: BlockPrompt | None = None,
    kd_rows: tuple[Tensor, Tensor] | None = None,
    keep: list[int] | None = None,
) -> Tensor:
    """A timm ViT block with extra key and value rows. (B, N, D) -> (B, N, D), or (B, len(keep), D).

    keep: the token rows whose output is wanted (the last block's others are never read).
    """
    attention: Any = block.attn
    batch, _, width = x.shape
    heads = attention.num_heads
    q, k, v = queries_keys_values(attention, block.norm1(x))  # type: ignore[operator]
    if prompt is not None and prompt.cls_key is not None and prompt.cls_value is not None:
        k = torch.cat([k[:, :1] + prompt.cls_key, k[:, 1:]], dim=1)
        v = torch.cat([v[:, :1] + prompt.cls_value, v[:, 1:]], dim=1)
    keys, values = [k], [v]
    for rows in ((prompt.keys, prompt.values) if prompt is not None else None, kd_rows):
        if rows is not None and rows[0] is not None and rows[1] is not None:
            keys.append(rows[0].to(k.dtype).expand(batch, -1, -1))
            values.append(rows[1].to(v.dtype).expand(batch, -1, -1))
    if keep is not None:
        q, x = q[:, keep], x[:, keep]

    def split(rows: list[Tensor]) -> Tensor:
        joined = torch.cat(rows, dim=1) if len(rows) > 1 else rows[0]
        return joined.reshape(batch, -1, heads, width // heads).transpose(1, 2)

    mixed = _attend(split([q]), split(keys), split(values), attention.scale)
    mixed = output_norm(attention)(mixed.transpose(1, 2).reshape(batch, -1, width))
    x = x + block.ls1(attention.proj(mixed))  # type: ignore[operator]
    return x + block.ls2(block.mlp(block.norm2(x)))  # type: ignore[operator]


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    if q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v, scale=scale)
    # On a CPU the fused kernel's backward is many times slower than these three operations.
    return ((q * scale) @ k.transpose(-2, -1)).softmax(dim=-1) @ v

"""Which exact rewrites a graph has: all, or fewer where somebody wants to know what one of them is worth."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Rewrites:
    """Each computes the same function; `benchmarks/export.py --rewrites` measures them one by one."""

    last_rows: bool = True
    "the last block answers for the class and KD rows only: queries, projection and MLP of one or two rows"
    last_products: bool = True
    """its scores are q W_k . h and its values (sum a h) W_v: keys and values of the tokens are never made. From
    LAST_TOKENS tokens on: below, the added operators cost more than the two products that they save."""
    shared_stem: bool = True
    "stem, first LayerNorm and first Q, K, V once for query pass and prompted pass"
    coda_products: bool = True
    "CODA's cosines as two matrix products for all blocks, its keys normalised beforehand"
    tables: bool = True
    "key rows and value rows of entries and constants lie apart, as attention reads them"
    input: bool = True
    "the normalisation of the image in the first layer's weights"
    scale: bool = True
    "attention scale and layer scale in the weights"
    heads: bool = True
    "both heads and alpha in one matrix"
    learnt: bool = True
    "pool and classes cut to what has been learnt; otherwise masked"


ALL = Rewrites()
LAST_TOKENS = 64
"tokens from which `last_products` pays: it saves 2 N D^2 products and adds 2 H N D a row, with about ten operators"

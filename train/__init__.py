"""From images to a trained teacher and student. Needs torch and timm; imports no other room."""

from __future__ import annotations

from ..verb import make_callable

make_callable(__name__)

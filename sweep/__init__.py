"""A grid of learner x distiller x query x seed: one `cdl-edge train` process a cell, one table at the end.

Cells that are finished are not run again and stopped ones are resumed, so that the same command always continues.
"""

"""A configuration as the options of `cdl-edge train`, for tests that start or kill the command."""

from cdl_edge.cli import cli
from cdl_edge.train.config import TrainConfig


def train_options(config: TrainConfig) -> list[str]:
    """What was asked for; a field without an option, as `decoder`, keeps its default."""
    known = {parameter.name for parameter in cli.commands["train"].params}
    given = {k: v for k, v in config.to_json().items() if v is not None and k in known and k != "compat"}
    return [part for key, value in given.items() for part in (f"--{key.replace('_', '-')}", str(value))]

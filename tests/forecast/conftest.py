"""The real runs that forecasts are measured against are those of the training tests."""

from tests.training.conftest import make_module, make_trainer, spec

__all__ = ["make_module", "make_trainer", "spec"]

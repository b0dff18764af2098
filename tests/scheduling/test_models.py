"""Names of models lead to pools, as engines match them."""

import pytest

from dp_extproc.config.pools import PoolConfig
from dp_extproc.engines.model import Role
from dp_extproc.request.rejection import Reason, Rejection
from dp_extproc.scheduling.models import ModelRegistry
from fleet_fixtures import Fleet, make_facts


def registry(*pools: list[str]) -> ModelRegistry:
    load = Fleet(workers=[make_facts(Role.WORKER)]).load
    workers = {"endpoints": ["http://10.0.0.1:1"]}
    return ModelRegistry([PoolConfig.model_validate({"models": each, "workers": workers}) for each in pools], load)


@pytest.mark.parametrize(
    ("pools", "model", "pool"),
    [
        ([["qwen"]], None, "qwen"),
        ([["qwen"]], "default", "qwen"),
        ([["qwen"]], "default:a", "qwen"),
        ([["qwen"]], "qwen:", "qwen"),
        ([["qwen"], ["default"]], "default", "default"),
        ([["qwen"], ["default"]], "default:a", "default"),
        ([["qwen"], ["*"]], "default", "*"),
        ([["qwen"], ["*"]], "qwen:a", "qwen"),
        ([["qwen"], ["*"]], "other:a", "*"),
        ([["qwen"], ["*"]], "*:a", "*"),
        ([["s3://b/m"], ["*"]], "s3://b/m:a", "s3://b/m"),
    ],
)
def test_model_is_in_its_pool(pools: list[list[str]], model: str | None, pool: str) -> None:
    """``default`` is a name like any other where it is configured."""
    assert registry(*pools).pool_of(model) == pool


@pytest.mark.parametrize(
    ("pools", "model", "reason"),
    [
        ([["qwen"]], "other", Reason.MODEL_NOT_FOUND),
        ([["qwen"]], "qwe:n", Reason.MODEL_NOT_FOUND),
        ([["qwen"]], "*", Reason.MODEL_NOT_FOUND),
        ([["qwen"], ["tiny"]], "default", Reason.MODEL_MISSING),
    ],
)
def test_model_of_no_pool_is_refused(pools: list[list[str]], model: str, reason: Reason) -> None:
    """A misspelt name is noticed."""
    found = registry(*pools).pool_of(model)

    assert isinstance(found, Rejection)
    assert found.reason is reason

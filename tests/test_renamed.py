"""Old names keep working for one version, with a warning that gives the new one."""

import pytest

from mixlora_kernels import config

RENAMED = {
    "Routing": "RoutingInput",
    "Conditioning": "ConditioningKind",
    "Gate": "GateKind",
    "Pool": "PooledTokens",
    "Decode": "DecodeRouting",
}


@pytest.mark.parametrize("old", RENAMED)
def test_an_old_name_is_the_new_one_and_warns(old):
    with pytest.warns(DeprecationWarning, match=rf"config\.{old} is now {RENAMED[old]}$"):
        assert getattr(config, old) is getattr(config, RENAMED[old])


def test_a_name_that_never_was_is_no_attribute():
    with pytest.raises(AttributeError, match="has no attribute 'Scale'"):
        config.Scale  # noqa: B018
